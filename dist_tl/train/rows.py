"""Selects the rows of a data set that a stage trains or is evaluated on."""

from functools import lru_cache
from typing import Literal

import numpy as np
from pydantic import Field

from dist_tl.config import StrictModel
from dist_tl.datasets.images import LabelledImages, first_copies
from dist_tl.datasets.spec import DataConfig, load_images
from dist_tl.datasets.splits import Indices, folds, split_target


class FoldSpec(StrictModel):
    """One fold of a stratified cross-validation on the selected rows."""

    index: int = Field(ge=0)
    count: int = Field(ge=2)
    seed: int
    held_out: bool = Field(
        description="Select the held-out rows of the fold, instead of the others."
    )


class SplitSpec(StrictModel):
    """A part of the target data; see `datasets/splits.py`."""

    labels_per_class: int = Field(ge=1)
    test_fraction: float = Field(gt=0, lt=1)
    data_seed: int = Field(description="Seed of the test split.")
    draw_seed: int = Field(description="Seed of the choice of labelled images.")
    part: Literal["train", "pool", "test"]


class RowsSpec(StrictModel):
    """Labelled rows: a data set, a part of it, or a fold of either."""

    data: DataConfig
    split: SplitSpec | None = Field(
        default=None, description="Part of the data; all rows if absent."
    )
    fold: FoldSpec | None = Field(
        default=None, description="Fold of the part; all its rows if absent."
    )
    together: bool = Field(
        default=False,
        description="Keep identical pictures on one side of the split and of the fold.",
    )


def load_rows(spec: RowsSpec) -> LabelledImages:
    """Loads the rows into memory.

    Raises:
        ConfigError: the split needs more rows than the data has.
        DataError: the data is damaged.
    """
    data = _load(spec.data)
    if spec.split is None and spec.fold is None:
        return data
    return data.subset(row_positions(spec))


def row_positions(spec: RowsSpec) -> Indices:
    """Returns the sorted positions of the rows in their data set; errors as :func:`load_rows`."""
    data, fold = _load(spec.data), spec.fold
    part = _part(data, spec.split, spec.together)
    if fold is None:
        return part
    first_copy = first_copies([data.digests[i] for i in part]) if spec.together else None
    pairs = folds(data.labels[part], fold.count, fold.seed, first_copy=first_copy)
    kept, held_out = pairs[fold.index]
    return part[held_out if fold.held_out else kept]


def _part(data: LabelledImages, split: SplitSpec | None, together: bool) -> Indices:
    if split is None:
        return np.arange(len(data))
    parts = split_target(
        data.labels,
        labels_per_class=split.labels_per_class,
        test_fraction=split.test_fraction,
        data_seed=split.data_seed,
        draw_seed=split.draw_seed,
        class_names=data.class_names,
        first_copy=data.first_copy if together else None,
    )
    return getattr(parts, split.part)


def _load(config: DataConfig) -> LabelledImages:
    return _load_cached(type(config), config.model_dump_json())


# A worker trains many stages on the same data. The key is the configuration as JSON, since a
# configuration that holds a list is not hashable.
@lru_cache(maxsize=4)
def _load_cached(kind: type[DataConfig], text: str) -> LabelledImages:
    return load_images(kind.model_validate_json(text))
