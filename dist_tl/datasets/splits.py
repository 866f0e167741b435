"""Stratified splits of labelled data: test split, label draw, folds, parts.

All functions are pure: the same labels and seeds give the same indices on every machine.
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
) -> TargetSplit:
    """Splits off a test set, then draws a few labelled images per class from the rest.

    The test set depends on `data_seed` only, so arms and repeats with other draw seeds are
    evaluated on the same images. A larger `labels_per_class` extends the draw of a smaller one.

    Args:
        labels: int64 [N].
        test_fraction: fraction of every class in the test set, rounded, but at least one image
            of each class and never all of them.
        class_names: for messages; labels are used by default.

    Raises:
        ConfigError: a value is out of range, or a class has too few images.
    """
    _require_labels(labels)
    if not 0.0 < test_fraction < 1.0:
        raise ConfigError(
            f"test_fraction: expected more than 0 and less than 1, got {test_fraction}"
        )
    if labels_per_class < 1:
        raise ConfigError(f"labels_per_class: expected at least 1, got {labels_per_class}")

    classes, counts = np.unique(labels, return_counts=True)
    num_test = np.clip((test_fraction * counts + 0.5).astype(np.int64), 1, counts - 1)
    _require_enough(classes, counts, counts - num_test, labels_per_class, class_names)

    train, pool, test = [], [], []
    for label, test_size in zip(classes, num_test, strict=True):
        members = np.flatnonzero(labels == label)
        shuffled = numpy_rng(data_seed, "test split", label).permutation(members)
        # Sorted, so that the draw depends on the set of remaining images, not on their order.
        rest = np.sort(shuffled[test_size:])
        drawn = numpy_rng(draw_seed, "label draw", label).permutation(rest)
        test.append(shuffled[:test_size])
        train.append(drawn[:labels_per_class])
        pool.append(drawn[labels_per_class:])
    return TargetSplit(*(np.sort(np.concatenate(part)) for part in (train, pool, test)))


def folds(labels: Labels, num_folds: int, seed: int) -> list[tuple[Indices, Indices]]:
    """Returns stratified cross-validation folds: (train, test) pairs of sorted positions.

    Every image is in the test part of exactly one fold, and both parts of every fold contain
    every class.

    Args:
        labels: int64 [N].

    Raises:
        ConfigError: fewer than 2 folds, or more folds than images of the smallest class.
    """
    _require_labels(labels)
    if num_folds < 2:
        raise ConfigError(f"folds: expected at least 2, got {num_folds}")
    classes, counts = np.unique(labels, return_counts=True)
    smallest = int(counts.argmin())
    if num_folds > counts[smallest]:
        raise ConfigError(
            f"folds: {num_folds} is more than the {counts[smallest]} images of class "
            f"{classes[smallest]}; use at most that many folds"
        )
    fold = assign_parts(labels, num_folds, numpy_rng(seed, "folds", num_folds))
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(num_folds)]


def assign_parts(labels: Labels, num_parts: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Assigns each image to a part in 0..num_parts-1, stratified by class.

    Sizes of parts differ by at most one, in every class and in total.
    """
    order = _shuffled_by_class(labels, rng)
    part = np.empty(len(labels), dtype=np.int64)
    part[order] = np.arange(len(labels)) % num_parts
    return part


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
