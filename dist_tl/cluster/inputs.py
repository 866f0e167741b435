"""Inputs of a hub's predictions: the shards of a stage, or rows of a data set."""

from functools import lru_cache
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError
from dist_tl.shards.manifest import StageManifest, read_entry, read_manifest
from dist_tl.shards.order import ShardPlan
from dist_tl.shards.reader import decode_shard, fetch_tar
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.feeds import to_tensor
from dist_tl.train.rows import RowsSpec, load_rows


class StageInput(StrictModel):
    """The shards of a stage of any run. Each router holds one shard in memory at a time."""

    kind: Literal["stage"] = "stage"
    run: str = Field(min_length=1, description="Folder or URL of the run.")
    stage: str = Field(min_length=1, description="Name of the stage, below stages/.")


class RowsInput(StrictModel):
    """Rows of a data set that fits in memory."""

    kind: Literal["rows"] = "rows"
    rows: RowsSpec
    samples_per_shard: int = Field(ge=1)


AnyInput = Annotated[StageInput | RowsInput, Field(discriminator="kind")]


class Samples(NamedTuple):
    """The samples of one shard.

    Attributes:
        images: float32 (N, C, H, W) in [-1, 1].
        labels: int64 (N,), or None if absent.
    """

    images: Tensor
    labels: NDArray[np.int64] | None


def input_manifest(source: StageInput) -> StageManifest:
    """Reads the manifest of the stage.

    Raises:
        ConfigError: there is no such stage.
    """
    manifest = read_manifest(ObjectStore(source.run), source.stage)
    if manifest is None:
        raise ConfigError(
            f"{source.run} has no stage {source.stage!r} of shards (no manifest); check run and "
            "stage"
        )
    return manifest


def input_plan(source: StageInput | RowsInput) -> ShardPlan:
    """Returns the shard plan of the input.

    Raises:
        ConfigError: there is no such stage.
    """
    if isinstance(source, StageInput):
        return input_manifest(source).plan
    return ShardPlan(
        stage="inputs",
        fingerprint="",
        purpose="inputs",
        seed=0,
        num_samples=len(load_rows(source.rows)),
        samples_per_shard=source.samples_per_shard,
        lanes=1,
        window=1,
    )


def input_shape(source: StageInput | RowsInput) -> tuple[int, int, int]:
    """Returns the shape (C, H, W) of the images."""
    if isinstance(source, StageInput):
        return input_manifest(source).image_shape
    return load_rows(source.rows).image_shape


def read_samples(source: StageInput | RowsInput, index: int) -> Samples:
    """Reads shard `index` of the input.

    Raises:
        ConfigError: the shard is not committed.
        ShardError: the shard is missing or damaged.
    """
    plan = _plan(source.model_dump_json())
    if isinstance(source, RowsInput):
        start = index * source.samples_per_shard
        part = load_rows(source.rows)
        rows = np.arange(start, start + plan.shard_size(index))
        return Samples(part.tensor(rows), part.labels[rows])
    store = ObjectStore(source.run)
    entry = read_entry(store, source.stage, index)
    if entry is None:
        raise ConfigError(
            f"shard {index} of stage {source.stage!r} in {source.run} is not committed; wait "
            "until the run that generates it has finished"
        )
    data = fetch_tar(store, source.stage, entry)
    shard = decode_shard(data, stage=source.stage, index=index, numbers=plan.order(index).numbers)
    return Samples(to_tensor(shard.images), shard.labels)


@lru_cache(maxsize=4)
def _plan(source: str) -> ShardPlan:
    kind = StageInput if '"kind":"stage"' in source else RowsInput
    return input_plan(kind.model_validate_json(source))
