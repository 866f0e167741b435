"""Selection of labelled data: classes, groups, parts and limits, using the digits."""

from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.utils import Bunch

from dist_tl.config import StrictModel, fingerprint, validate
from dist_tl.datasets.spec import DataConfig, load_images
from dist_tl.errors import ConfigError

LOOPS = {"no loop": ["1", "2", "3", "5", "7"], "one loop": ["0", "4", "6", "9"], "two loops": ["8"]}


class Job(StrictModel):
    data: DataConfig


def config_of(**fields):
    return validate(Job, {"data": {"source": "digits", **fields}}, source="job").data


def load(seed=0, **fields):
    return load_images(config_of(**fields), seed=seed)


def original_digits():
    digits = load_digits()
    assert isinstance(digits, Bunch)
    return digits


def rows(data):
    """Returns images as hashable rows; no two digits are the same image."""
    return [image.tobytes() for image in data.images]


def test_digits_are_those_of_scikit_learn_scaled_to_uint8():
    data, original = load(), original_digits()
    assert data.images.shape == (1797, 8, 8, 1)
    assert data.images.dtype == np.uint8
    assert data.labels.dtype == np.int64
    assert np.abs(data.images[..., 0] - original.images * 255 / 16).max() <= 0.5
    assert data.images.max() == 255
    assert data.labels.tolist() == original.target.tolist()
    assert data.class_names == tuple("0123456789")


def test_classes_are_renumbered_in_the_given_order():
    data = load(classes=["8", 3])
    assert data.class_names == ("8", "3")
    everything = load()
    expected = Counter(rows(everything.subset(np.flatnonzero(everything.labels == 8))))
    assert Counter(rows(data.subset(np.flatnonzero(data.labels == 0)))) == expected
    assert set(data.labels) == {0, 1}


def test_groups_of_digits_by_their_loops():
    data, digit = load(groups=LOOPS), original_digits().target
    assert data.class_names == ("no loop", "one loop", "two loops")
    expected = np.array([1, 0, 0, 0, 1, 0, 1, 0, 2, 1])[digit]
    assert data.labels.tolist() == expected.tolist()


def test_classes_in_no_group_are_dropped():
    data = load(groups={"even": ["0", "2"], "odd": [1]})
    assert len(data) == np.isin(original_digits().target, [0, 1, 2]).sum()


def test_the_order_of_groups_changes_neither_the_fingerprint_nor_the_labels():
    backwards = dict(reversed(LOOPS.items()))
    assert fingerprint(config_of(groups=LOOPS)) == fingerprint(config_of(groups=backwards))
    assert load(groups=LOOPS).labels.tolist() == load(groups=backwards).labels.tolist()


@pytest.mark.parametrize("of", [1, 2, 3])
def test_parts_are_disjoint_complete_and_stratified(of):
    parts = [load(part={"index": i, "of": of}) for i in range(of)]
    assert Counter(row for part in parts for row in rows(part)) == Counter(rows(load()))
    counts = np.array([np.bincount(part.labels, minlength=10) for part in parts])
    assert np.ptp(counts, axis=0).max() <= 1
    assert np.ptp(counts.sum(axis=1)) <= 1


def test_parts_with_different_class_names_are_disjoint():
    digits = load(classes=["8", "1"], part={"index": 0, "of": 2})
    loops = load(groups=LOOPS, part={"index": 1, "of": 2}, limit=500)
    assert not set(rows(digits)) & set(rows(loops))


def test_the_division_depends_on_the_seed_of_the_parts_only():
    first = rows(load(part={"index": 0, "of": 2}, seed=0))
    assert rows(load(part={"index": 0, "of": 2}, seed=1)) == first
    assert rows(load(part={"index": 0, "of": 2, "seed": 1})) != first


@pytest.mark.parametrize("limit", [10, 11, 57, 1796])
def test_a_limit_keeps_that_many_images_evenly_from_all_classes(limit):
    data = load(limit=limit)
    assert len(data) == limit
    share = np.bincount(data.labels, minlength=10) / np.bincount(load().labels)
    assert np.ptp(share) * 174 <= 2.0
    assert data.labels.tolist() != sorted(data.labels)  # in the source's order


def test_a_limit_depends_on_the_seed_and_has_no_effect_above_the_size():
    assert rows(load(limit=20)) == rows(load(limit=20))
    assert rows(load(limit=20, seed=1)) != rows(load(limit=20))
    assert rows(load(limit=5000)) == rows(load())


def test_size_and_channels_are_converted():
    data = load(size=12, channels=3, limit=10)
    assert data.images.shape == (10, 12, 12, 3)
    assert data.image_shape == (3, 12, 12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": ["8", "eight"]}, "no class 'eight'; did you mean"),
        ({"classes": [10]}, r"class index 10: expected 0\.\.9"),
        ({"classes": ["8", 8]}, "'8' is listed twice"),
        ({"groups": {"a": ["1", "2"], "b": ["2"]}}, "'2' is in 'a' and 'b'"),
        ({"groups": {"a": ["1", 1], "b": ["2"]}}, "'1' is twice in 'a'"),
        ({"groups": {"a": ["x"]}}, "no class 'x'"),
        ({"groups": {"a": ["1"]}, "classes": ["1"]}, "keep one of them"),
        ({"part": {"index": 2, "of": 2}}, r"index 2 of 2 parts: expected 0\.\.1"),
        ({"part": {"index": 0, "of": 175}}, "part.of can be at most 174"),
        ({"limit": 9}, "less than one image for each of the 10 classes"),
        ({"limit": 0}, "greater than or equal to 1"),
        ({"classes": []}, "at least 1 item"),
        ({"classes": [False, True]}, "valid integer"),
        ({"channels": 2}, "1 or 3"),
        ({"sise": 8}, "did you mean 'size'"),
    ],
)
def test_the_error_of_an_invalid_job_says_what_to_change(fields, message):
    with pytest.raises(ConfigError, match=message):
        load(**fields)


def test_the_error_of_an_unknown_source_lists_the_known_ones():
    with pytest.raises(ConfigError, match="'digits', 'folder', 'wds'"):
        validate(Job, {"data": {"source": "mnist"}}, source="job")


def test_a_resolved_config_round_trips():
    config = config_of(groups=LOOPS, part={"index": 1, "of": 2}, size=16, views={"kind": "none"})
    assert validate(Job, {"data": config.model_dump(mode="json")}, source="job").data == config


def test_default_views_are_digits_for_digits_and_natural_for_folders():
    assert config_of().views.kind == "digits"
    folder = validate(Job, {"data": {"source": "folder", "path": "x"}}, source="job").data
    assert folder.views.kind == "natural"
