"""What a geometric labelling refuses before it starts."""

import pytest

from dist_tl.errors import ConfigError
from dist_tl.jobs.job_file import read_job
from dist_tl.jobs.plan import plan_job

PRESET = "launch/presets/geometric_labels.yaml"
POOL = "pool={source: digits, groups: {zero: ['0'], other: ['1', '2', '3', '4']}}"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("{sources: [[zero], [zero, othr]], targets: [['6']]}", r"sources: .*'othr'.*'other'"),
        ("{sources: [[zero]], targets: [['6', '77']]}", r"targets: .*'77'; did you mean '7'"),
    ],
)
def test_a_class_of_pairs_that_the_data_lacks_is_named_with_the_nearest_one(pairs, message):
    job = read_job(PRESET, [POOL, f"pairs={pairs}"])
    with pytest.raises(ConfigError, match=r"pairs\." + message):
        plan_job(job)


def test_pairs_of_classes_that_exist_can_be_planned():
    pairs = "{sources: [[zero, other]], targets: [['6'], ['7']]}"
    assert plan_job(read_job(PRESET, [POOL, f"pairs={pairs}"])).tasks
