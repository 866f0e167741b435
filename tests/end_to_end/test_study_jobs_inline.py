"""Jobs that measure, without Ray: what they compute does not depend on where it is computed."""

import json
from pathlib import Path

import pytest
import torch
from inline_workers import open_inline_workers
from test_study_jobs import FORECAST, GEOMETRY, LAYER_SEARCH, MANIFOLD, job_file, measured

from dist_tl.jobs import run as jobs_run


@pytest.fixture
def inline(alone, command, monkeypatch):
    """Runs jobs in this process: what they compute does not depend on Ray."""
    monkeypatch.setattr(jobs_run, "open_workers", open_inline_workers)
    threads = torch.get_num_threads()

    def run(folder, job, verb="run", **changes):
        code, out, err = command(verb, job_file(folder, job, **changes), "--json")
        assert code == 0, err[-3000:]
        return json.loads(out)

    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)
    import ray  # after dist_tl.cluster, which sets what Ray reads when it is imported

    assert not ray.is_initialized(), "a job that starts Ray by itself cannot be run inline"


def test_a_forecast_tells_what_each_map_needs_and_how_far_it_is_off(tmp_path, inline):
    results = inline(tmp_path, FORECAST, verb="forecast")
    needed, checks = results["tables"]
    assert [row[0] for row in needed["rows"]] == ["pixels", "random", "last"]
    assert len(checks["rows"]) == 6
    gaps = [abs(float(row[4])) for row in checks["rows"] if row[0] in ("pixels", "random")]
    assert max(gaps) < 25
    assert Path(tmp_path / "run" / "report.html").exists()


def test_a_forecast_of_another_kind_of_job_is_refused(command, tmp_path):
    code, _, err = command("forecast", job_file(tmp_path, MANIFOLD))
    assert code == 2
    assert "expected forecast, got manifold" in " ".join(err.split())


def test_too_few_labels_for_so_many_components_stop_the_forecast(command, tmp_path):
    job = {**FORECAST, "components": 60, "teacher": None, "maps": [{"kind": "pixels"}]}
    code, _, err = command("forecast", job_file(tmp_path, job))
    assert code == 2
    assert "principal components" in " ".join(err.split())


def test_one_label_a_class_can_be_handled_by_views_and_batches_do_not_matter(tmp_path, inline):
    changes = {"search": {"permutations": 0, "one_shot": "augmented_views"}, "trained": None}
    changes |= {"held_out": None, "export_shots": None, "session": {"num_cpus": 2}}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = inline(tmp_path / "one", LAYER_SEARCH, **changes)
    two = inline(tmp_path / "two", LAYER_SEARCH, **changes, rows_per_task=1000)
    assert any("K = 1" in line and "augmented_views" in line for line in one["findings"])
    assert measured(one) == measured(two)


@pytest.mark.parametrize(
    ("job", "changes", "told"),
    [
        (GEOMETRY, {"m": 7}, "m: 7 is more than anchors.count"),
        (GEOMETRY, {"anchors": {}}, "either data or count"),
        (GEOMETRY, {"session": {"num_cpus": 2}}, "need 3, got 2"),
        (
            GEOMETRY,
            {"pool": {"source": "folder", "path": "/pool", "unlabelled": True}},
            "without labels there are no human_labels and no pairs",
        ),
        (
            GEOMETRY,
            {"rare": {"min_count": 400}, "anchors": {"data": GEOMETRY["pool"]}},
            "lower it, shorten m",
        ),
        (LAYER_SEARCH, {"episodes": {"ways": 9}}, "expected at least 9 classes for 9 ways, got 5"),
        (
            LAYER_SEARCH,
            {"held_out": {"data": {"source": "digits", "classes": ["2", "3"]}}},
            "trained on class 2",
        ),
    ],
)
@pytest.mark.usefixtures("inline")  # one of them is found out after its features are known
def test_jobs_that_cannot_work_say_why(command, tmp_path, job, changes, told):
    code, _, err = command("run", job_file(tmp_path, job, **changes))
    assert code == 2
    assert told in " ".join(err.split())
