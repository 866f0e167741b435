"""Which rows of which data set a stage learns from or is measured on."""

from functools import lru_cache
from typing import Literal

from pydantic import Field

from dist_tl.config import StrictModel
from dist_tl.datasets.images import LabelledImages
from dist_tl.datasets.spec import DataConfig, load_images
from dist_tl.datasets.splits import folds, split_target


class FoldSpec(StrictModel):
    """One fold of a stratified cross-validation on the chosen rows."""

    index: int = Field(ge=0)
    count: int = Field(ge=2)
    seed: int
    held_out: bool = Field(description="The rows set aside by this fold, instead of the others.")


class SplitSpec(StrictModel):
    """A part of the target data; see `datasets/splits.py`."""

    labels_per_class: int = Field(ge=1)
    test_fraction: float = Field(gt=0, lt=1)
    data_seed: int = Field(description="Fixes the test split.")
    draw_seed: int = Field(description="Fixes which images are labelled.")
    part: Literal["train", "pool", "test"]


class RowsSpec(StrictModel):
    """Labelled rows: a whole data set, a part of it, or a fold of either."""

    data: DataConfig
    split: SplitSpec | None = Field(default=None, description="Absent: all rows.")
    fold: FoldSpec | None = Field(default=None, description="Absent: the whole part.")


def load_rows(spec: RowsSpec) -> LabelledImages:
    """The rows in memory.

    Raises:
        ConfigError: the split asks for more than the data has.
        DataError: the data is damaged.
    """
    rows = _part(_load(spec.data), spec.split)
    if spec.fold is None:
        return rows
    kept, held_out = folds(rows.labels, spec.fold.count, spec.fold.seed)[spec.fold.index]
    return rows.subset(held_out if spec.fold.held_out else kept)


def _part(data: LabelledImages, split: SplitSpec | None) -> LabelledImages:
    if split is None:
        return data
    parts = split_target(
        data.labels,
        labels_per_class=split.labels_per_class,
        test_fraction=split.test_fraction,
        data_seed=split.data_seed,
        draw_seed=split.draw_seed,
        class_names=data.class_names,
    )
    return data.subset(getattr(parts, split.part))


# A worker trains many stages on the same target data; configurations are frozen and hashable
# unless they hold lists, so the text of the configuration is the key.
def _load(config: DataConfig) -> LabelledImages:
    return _load_text(type(config), config.model_dump_json())


@lru_cache(maxsize=4)
def _load_text(kind: type[StrictModel], text: str) -> LabelledImages:
    return load_images(kind.model_validate_json(text))
