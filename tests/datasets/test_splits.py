"""Stratified splits: disjoint, complete, and dependent on the right seeds only."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_tl.datasets.images import first_copies
from dist_tl.datasets.splits import assign_parts, draw_evenly, folds, split_target
from dist_tl.errors import ConfigError

SEEDS = st.integers(0, 2**31)


@st.composite
def shuffled_labels(draw, smallest=4, largest=25):
    """Draws 1 to 5 classes of `smallest` to `largest` images each, in random order."""
    counts = draw(st.lists(st.integers(smallest, largest), min_size=1, max_size=5))
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(draw(SEEDS)).permutation(labels)


def split(labels, labels_per_class=2, test_fraction=0.3, data_seed=0, draw_seed=0, **more):
    return split_target(
        labels,
        labels_per_class=labels_per_class,
        test_fraction=test_fraction,
        data_seed=data_seed,
        draw_seed=draw_seed,
        **more,
    )


def counts(labels, indices):
    return np.bincount(labels[indices], minlength=labels.max() + 1)


@settings(deadline=None, max_examples=60)
@given(shuffled_labels(), st.floats(0.01, 0.5), st.integers(1, 2), SEEDS, SEEDS)
def test_a_split_is_disjoint_sorted_complete_and_stratified(labels, share, k, seed, draw):
    result = split(labels, k, share, seed, draw)
    parts = (result.train, result.pool, result.test)
    assert np.sort(np.concatenate(parts)).tolist() == list(range(len(labels)))
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
    total = np.bincount(labels)
    assert (counts(labels, result.train) == k).all()
    assert (np.abs(counts(labels, result.test) - share * total) <= 1.0).all()
    assert counts(labels, result.test).min() >= 1


@settings(deadline=None, max_examples=30)
@given(shuffled_labels(smallest=8), SEEDS, SEEDS)
def test_the_test_split_depends_on_the_data_seed_only(labels, draw, other_draw):
    first, second = split(labels, 1, draw_seed=draw), split(labels, 4, draw_seed=other_draw)
    assert first.test.tolist() == second.test.tolist()


def test_each_seed_changes_its_own_split():
    labels = np.arange(400) % 4
    base = split(labels, 10)
    assert split(labels, 10, draw_seed=1).train.tolist() != base.train.tolist()
    assert split(labels, 10, data_seed=1).test.tolist() != base.test.tolist()
    assert split(labels, 10).train.tolist() == base.train.tolist()


def test_more_labels_per_class_extend_a_smaller_draw():
    labels = np.arange(60) % 3
    draws = [set(split(labels, k).train) for k in (1, 2, 5, 14)]
    assert all(few < many for few, many in pairwise(draws))


def test_the_split_of_a_class_does_not_depend_on_other_classes():
    labels = np.repeat([0, 1, 2], 20)
    only_last = split(labels[40:])
    assert split(labels).test[-6:].tolist() == (only_last.test + 40).tolist()


def test_the_smallest_classes_have_one_image_in_each_split():
    result = split(np.array([0, 0, 1, 1]), 1, 0.01)
    assert (len(result.train), len(result.pool), len(result.test)) == (2, 0, 2)
    assert len(split(np.array([0, 0, 1, 1]), 1, 0.99).train) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels_per_class": 4}, "labels_per_class: 4 is more than class 1 .* 5 images.* most 3"),
        ({"labels_per_class": 4, "class_names": ("cat", "dog")}, "class 'dog' has"),
        ({"labels_per_class": 0}, "at least 1, got 0"),
        ({"test_fraction": 0.0}, "test_fraction: expected more than 0"),
        ({"test_fraction": 1.0}, "less than 1, got 1.0"),
    ],
)
def test_the_error_of_an_impossible_split_suggests_a_valid_one(arguments, message):
    labels = np.array([0] * 9 + [1] * 5)
    with pytest.raises(ConfigError, match=message):
        split(labels, **{"test_fraction": 0.4, **arguments})


def test_the_suggested_number_of_labels_is_valid():
    labels = np.array([0] * 9 + [1] * 5)
    assert counts(labels, split(labels, 3, 0.4).train).tolist() == [3, 3]


def test_a_class_of_a_single_image_is_rejected():
    with pytest.raises(ConfigError, match="class 1 has a single image"):
        split(np.array([0, 0, 0, 1]), 1)


def test_labels_of_invalid_dtype_or_shape_are_rejected():
    for labels in (np.zeros(3), np.zeros((2, 2), np.int64), np.zeros(0, np.int64)):
        with pytest.raises(ValueError, match="expected integer labels"):
            split(labels)


@settings(deadline=None, max_examples=40)
@given(shuffled_labels(), st.integers(2, 4), SEEDS)
def test_every_image_is_tested_once_and_every_class_is_in_both_parts(labels, num, seed):
    pairs = folds(labels, num, seed)
    assert len(pairs) == num
    tested = np.concatenate([test for _, test in pairs])
    assert np.sort(tested).tolist() == list(range(len(labels)))
    for train, test in pairs:
        assert np.sort(np.concatenate([train, test])).tolist() == list(range(len(labels)))
        assert counts(labels, train).min() >= 1
        assert counts(labels, test).min() >= 1
    assert np.ptp([len(test) for _, test in pairs]) <= 1


def test_folds_depend_on_their_seed():
    labels = np.arange(40) % 2
    first, again, other = (folds(labels, 4, seed)[0][1].tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_too_few_or_too_many_folds_are_rejected():
    labels = np.array([0] * 6 + [7] * 3)
    assert len(folds(labels, 3, 0)) == 3
    with pytest.raises(ConfigError, match="4 is more than the 3 images of class 7"):
        folds(labels, 4, 0)
    with pytest.raises(ConfigError, match="at least 2, got 1"):
        folds(labels, 1, 0)


@settings(deadline=None, max_examples=40)
@given(shuffled_labels(smallest=1), st.integers(1, 6), SEEDS)
def test_part_sizes_differ_by_at_most_one_in_every_class_and_in_total(labels, num_parts, seed):
    part = assign_parts(labels, num_parts, np.random.default_rng(seed))
    sizes = np.array([counts(labels, part == k) for k in range(num_parts)])
    assert np.ptp(sizes, axis=0).max() <= 1
    assert np.ptp(sizes.sum(axis=1)) <= 1


@settings(deadline=None, max_examples=40)
@given(shuffled_labels(smallest=1), st.data())
def test_draw_evenly_returns_the_number_of_images_and_includes_every_class(labels, data):
    num_classes = labels.max() + 1
    num_drawn = data.draw(st.integers(num_classes, len(labels)))
    drawn = draw_evenly(labels, num_drawn, np.random.default_rng(data.draw(SEEDS)))
    assert len(set(drawn)) == num_drawn
    assert counts(labels, drawn).min() >= 1


# Identical images.


@st.composite
def labels_with_copies(draw):
    """Draws labels of 2 to 4 classes, and which images are copies; a few have another label."""
    labels = draw(shuffled_labels(smallest=12, largest=30))
    rng = np.random.default_rng(draw(SEEDS))
    pictures = np.arange(len(labels))
    for image in rng.choice(len(labels), size=len(labels) // 3, replace=False):
        same = np.flatnonzero(labels == labels[image]) if rng.random() < 0.9 else pictures
        pictures[image] = pictures[rng.choice(same)]
    return labels, first_copies([str(picture).encode() for picture in pictures])


def sides(first_copy, parts):
    """For every picture the parts that have an image of it."""
    return [
        {k for k, part in enumerate(parts) if np.isin(part, group).any()}
        for group in (np.flatnonzero(first_copy == first) for first in np.unique(first_copy))
    ]


@settings(deadline=None, max_examples=60)
@given(labels_with_copies(), st.floats(0.1, 0.6), SEEDS, SEEDS)
def test_copies_stay_in_one_part_of_a_split(data, share, seed, draw):
    labels, first_copy = data
    result = split(labels, 2, share, seed, draw, first_copy=first_copy)
    parts = (result.train, result.pool, result.test)
    assert np.sort(np.concatenate(parts)).tolist() == list(range(len(labels)))
    assert all(len(side) == 1 for side in sides(first_copy, parts))
    drawn = np.intersect1d(result.train, np.unique(first_copy))
    assert (counts(labels, drawn) == 2).all(), "K counts distinct images"


def test_the_test_set_of_a_class_grows_by_the_copies_of_one_image_at_most():
    labels, first_copy = np.zeros(40, np.int64), np.repeat(np.arange(0, 40, 4), 4)
    for seed in range(10):
        test = split(labels, 1, 0.3, seed, first_copy=first_copy).test
        assert 12 <= len(test) < 12 + 4


@settings(deadline=None, max_examples=40)
@given(labels_with_copies(), st.integers(2, 4), SEEDS)
def test_copies_stay_in_one_fold_and_one_part(data, num, seed):
    labels, first_copy = data
    for train, test in folds(labels, num, seed, first_copy=first_copy):
        assert all(len(side) == 1 for side in sides(first_copy, (train, test)))
        assert counts(labels, test).min() >= 1
    part = assign_parts(labels, num, np.random.default_rng(seed), first_copy=first_copy)
    assert (part == part[first_copy]).all()


def test_folds_and_label_draws_count_distinct_images():
    labels, first_copy = np.repeat([0, 1], 6), np.array([0, 0, 0, 0, 4, 5, 6, 7, 8, 9, 10, 11])
    assert len(folds(labels, 3, 0, first_copy=first_copy)) == 3
    with pytest.raises(ConfigError, match="4 is more than the 3 images of class 0"):
        folds(labels, 4, 0, first_copy=first_copy)
    with pytest.raises(ConfigError, match="3 is more than class 0 has: 2"):
        split(labels, 3, 0.1, first_copy=first_copy)


def test_a_class_of_nothing_but_copies_of_another_is_rejected():
    labels, first_copy = np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 0, 1])
    with pytest.raises(ConfigError, match="every image of class 1 is a copy"):
        split(labels, 1, first_copy=first_copy)


def test_without_copies_all_splits_are_those_of_results_published_earlier():
    digest = hashlib.sha256()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.repeat(np.arange(4), rng.integers(8, 25, 4)))
        alone = np.arange(len(labels))
        result = split(labels, 3, 0.37, seed, seed + 1, first_copy=alone)
        arrays = [result.train, result.pool, result.test]
        arrays += [side for fold in folds(labels, 3, seed, first_copy=alone) for side in fold]
        arrays += [assign_parts(labels, 5, np.random.default_rng(seed), first_copy=alone)]
        for array in arrays:
            digest.update(array.tobytes())
    assert digest.hexdigest().startswith("09e54b16b9da994b")
