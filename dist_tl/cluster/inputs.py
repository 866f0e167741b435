"""Where the samples come from that a hub is to answer: a stage of shards, or rows of a data set."""

from functools import lru_cache
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from dist_tl.config import StrictModel
from dist_tl.datasets.images import to_float
from dist_tl.errors import ConfigError
from dist_tl.shards.manifest import StageManifest, read_entry, read_manifest
from dist_tl.shards.order import ShardPlan
from dist_tl.shards.reader import decode_shard, fetch_tar
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.rows import RowsSpec, load_rows


class StageInput(StrictModel):
    """The shards of a stage of some run; only one shard a router is in memory at a time."""

    kind: Literal["stage"] = "stage"
    run: str = Field(min_length=1, description="Folder or URL of the run that has the stage.")
    stage: str = Field(min_length=1, description="Its name below stages/.")


class RowsInput(StrictModel):
    """Rows of a data set that fits into memory."""

    kind: Literal["rows"] = "rows"
    rows: RowsSpec
    samples_per_shard: int = Field(ge=1)


AnyInput = Annotated[StageInput | RowsInput, Field(discriminator="kind")]


class Samples(NamedTuple):
    """One shard's worth.

    Attributes:
        images: float32 (N, C, H, W) in [-1, 1].
        labels: int64 (N,), or None where there are none.
    """

    images: Tensor
    labels: NDArray[np.int64] | None


def input_manifest(source: StageInput) -> StageManifest:
    """What all shards of the stage have in common.

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
    """How the samples are divided.

    Raises:
        ConfigError: there are none.
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
    """(C, H, W) of the images."""
    if isinstance(source, StageInput):
        return input_manifest(source).image_shape
    return load_rows(source.rows).image_shape


def read_samples(source: StageInput | RowsInput, index: int) -> Samples:
    """Shard `index` of the input.

    Raises:
        ConfigError: it is not committed.
        ShardError: it is lost or damaged.
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
            f"shard {index} of stage {source.stage!r} in {source.run} is not committed; let the "
            "run that makes it end first"
        )
    data = fetch_tar(store, source.stage, entry)
    shard = decode_shard(data, stage=source.stage, index=index, numbers=plan.order(index).numbers)
    if shard.images.dtype == np.float32:
        images = torch.from_numpy(shard.images.transpose(0, 3, 1, 2).copy())
    else:
        images = to_float(shard.images)
    return Samples(images, shard.labels)


@lru_cache(maxsize=4)
def _plan(source: str) -> ShardPlan:
    kind = StageInput if '"kind":"stage"' in source else RowsInput
    return input_plan(kind.model_validate_json(source))
