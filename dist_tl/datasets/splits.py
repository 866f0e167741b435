"""Stratified splits of labelled data: test split, label draw, folds, parts.

All functions are pure: the same labels and seeds give the same indices on every machine.

Identical images can be kept on one side: `first_copy` names the first image with the same pixels,
and the draws are over these first images, which the later copies follow. Without copies the draws
are those without `first_copy`, bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dist_tl.errors import ConfigError
from dist_tl.seeds import numpy_rng

Labels = NDArray[np.int64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TargetSplit:
    """Disjoint sorted int64 positions that cover all the data.

    Attributes:
        train: labelled images for training.
        pool: remaining images; a method may use the images but not their labels.
        test: images for measuring accuracy.
    """

    train: Indices
    pool: Indices
    test: Indices


def split_target(
    labels: Labels,
    *,
    labels_per_class: int,
    test_fraction: float,
    data_seed: int,
    draw_seed: int,
    class_names: Sequence[str] | None = None,
    first_copy: Indices | None = None,
) -> TargetSplit:
    """Splits off a test set, then draws a few labelled images per class from the rest.

    The test set depends on `data_seed` only, so arms and repeats with other draw seeds are
    evaluated on the same images. A larger `labels_per_class` extends the draw of a smaller one.

    Args:
        labels: int64 [N].
        test_fraction: fraction of every class in the test set, rounded, but at least one image
            of each class and never all of them.
        class_names: for messages; labels are used by default.
        first_copy: int64 [N], for every image the first one with the same pixels; copies then
            stay on one side. `labels_per_class` counts distinct images, and the test set of a class
            may be larger by the copies of one image. Absent: every image is drawn by itself.

    Raises:
        ConfigError: a value is out of range, or a class has too few (distinct) images.
    """
    _require_labels(labels)
    if not 0.0 < test_fraction < 1.0:
        raise ConfigError(
            f"test_fraction: expected more than 0 and less than 1, got {test_fraction}"
        )
    if labels_per_class < 1:
        raise ConfigError(f"labels_per_class: expected at least 1, got {labels_per_class}")

    firsts = _firsts(labels, first_copy)
    copies = np.bincount(firsts, minlength=len(labels))  # of an image, at the first of them
    classes, test, rests = np.unique(labels), [], []
    for label in classes:
        members = np.flatnonzero((labels == label) & (copies > 0))
        shuffled = numpy_rng(data_seed, "test split", label).permutation(members)
        test_size = _test_size(copies[shuffled], test_fraction)
        test.append(shuffled[:test_size])
        # Sorted, so that the draw depends on the set of remaining images, not on their order.
        rests.append(np.sort(shuffled[test_size:]))
    available = np.array([len(rest) for rest in rests])
    counts = available + np.array([len(drawn) for drawn in test])
    _require_enough(classes, counts, available, labels_per_class, class_names)

    train, pool = [], []
    for label, rest in zip(classes, rests, strict=True):
        drawn = numpy_rng(draw_seed, "label draw", label).permutation(rest)
        train.append(drawn[:labels_per_class])
        pool.append(drawn[labels_per_class:])
    parts = (np.concatenate(part) for part in (train, pool, test))
    return TargetSplit(*(np.flatnonzero(np.isin(firsts, part)) for part in parts))


def _firsts(labels: Labels, first_copy: Indices | None) -> Indices:
    return np.arange(len(labels)) if first_copy is None else first_copy


def _test_size(copies: Indices, test_fraction: float) -> int:
    """Returns how many of a class's distinct images, with so many copies each, are for testing."""
    total = int(copies.sum())
    wanted = np.clip(int(test_fraction * total + 0.5), 1, total - 1)
    before = np.cumsum(copies) - copies
    return max(0, min(int((before < wanted).sum()), len(copies) - 1))


def folds(
    labels: Labels, num_folds: int, seed: int, *, first_copy: Indices | None = None
) -> list[tuple[Indices, Indices]]:
    """Returns stratified cross-validation folds: (train, test) pairs of sorted positions.

    Every image is in the test part of exactly one fold, and both parts of every fold contain
    every class.

    Args:
        labels: int64 [N].
        first_copy: as in :func:`split_target`.

    Raises:
        ConfigError: fewer than 2 folds, or more folds than (distinct) images of the smallest class.
    """
    _require_labels(labels)
    if num_folds < 2:
        raise ConfigError(f"folds: expected at least 2, got {num_folds}")
    classes = np.unique(labels)
    drawn = labels[np.unique(_firsts(labels, first_copy))]
    counts = np.array([np.count_nonzero(drawn == label) for label in classes])
    smallest = int(counts.argmin())
    if num_folds > counts[smallest]:
        raise ConfigError(
            f"folds: {num_folds} is more than the {counts[smallest]} images of class "
            f"{classes[smallest]}; use at most that many folds"
        )
    rng = numpy_rng(seed, "folds", num_folds)
    fold = assign_parts(labels, num_folds, rng, first_copy=first_copy)
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(num_folds)]


def assign_parts(
    labels: Labels,
    num_parts: int,
    rng: np.random.Generator,
    *,
    first_copy: Indices | None = None,
) -> NDArray[np.int64]:
    """Assigns each image to a part in 0..num_parts-1, stratified by class.

    Sizes of parts differ by at most one, in every class and in total; with `first_copy` (as in
    :func:`split_target`) this holds for the distinct images.
    """
    firsts = _firsts(labels, first_copy)
    drawn = np.unique(firsts)
    order = drawn[_shuffled_by_class(labels[drawn], rng)]
    part = np.empty(len(labels), dtype=np.int64)
    part[order] = np.arange(len(order)) % num_parts
    return part[firsts]


def draw_evenly(labels: Labels, num_drawn: int, rng: np.random.Generator) -> Indices:
    """Draws `num_drawn` images with the class proportions of the data. Returns sorted positions.

    Every class has at least one image if `num_drawn` is at least the number of classes.
    """
    order = _shuffled_by_class(labels, rng)
    _, counts = np.unique(labels, return_counts=True)
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(labels)) - np.repeat(starts, counts)
    depth = (rank + 0.5) / np.repeat(counts, counts)
    depth[rank == 0] = -1.0  # the first image of each class precedes all others
    return np.sort(order[np.argsort(depth, kind="stable")[:num_drawn]])


def _shuffled_by_class(labels: Labels, rng: np.random.Generator) -> Indices:
    shuffled = rng.permutation(len(labels))
    return shuffled[np.argsort(labels[shuffled], kind="stable")]


def _require_labels(labels: Labels) -> None:
    if labels.ndim != 1 or len(labels) == 0 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"expected integer labels [N], N >= 1; got {labels.dtype} {labels.shape}")


def _require_enough(
    classes: Labels,
    counts: NDArray[np.int64],
    available: NDArray[np.int64],
    labels_per_class: int,
    class_names: Sequence[str] | None,
) -> None:
    smallest = int(available.argmin())
    label, count, most = int(classes[smallest]), counts[smallest], available[smallest]
    name = repr(class_names[label]) if class_names is not None else str(label)
    if count == 0:
        raise ConfigError(
            f"every image of class {name} is a copy of an image of another class; correct the "
            "labels, or set duplicates: allow"
        )
    if counts.min() < 2:
        raise ConfigError(
            f"class {name} has a single image; at least 2 are required, one for training and one "
            "for the test split"
        )
    if most < labels_per_class:
        raise ConfigError(
            f"labels_per_class: {labels_per_class} is more than class {name} has: {most} of its "
            f"{count} images are outside the test split; use at most {most}"
        )
