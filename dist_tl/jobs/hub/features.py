"""Ray tasks of a hub's warm start: every expert runs once, and its features become rows."""

import time
from collections.abc import Iterator

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from dist_tl.config import StrictModel
from dist_tl.shards.order import ShardPlan
from dist_tl.shards.sample import PseudoSample
from dist_tl.shards.writer import write_shard
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.hub_model import ExpertSource, build_expert
from dist_tl.train.rows import RowsSpec, load_rows

BATCH = 256


class FeaturesInputs(StrictModel):
    """Features that one expert's frozen trunk makes of some sets of rows."""

    expert: ExpertSource
    rows: dict[str, RowsSpec] = Field(description="By name.")
    num_classes: int
    key: str = Field(description="Where they are stored, by the names of the sets.")


class FeaturesOutput(StrictModel):
    """What was stored."""

    width: int
    seconds: float


class RowsInputs(StrictModel):
    """Images and cached features side by side, as shards."""

    plan: ShardPlan
    rows: RowsSpec
    name: str = Field(description="Of the rows in the experts' files.")
    features: tuple[str, ...] = Field(description="The experts' files, in order of the hub.")


class RowsOutput(StrictModel):
    """What was committed."""

    shards: int
    bytes: int
    seconds: float


@torch.no_grad()
def compute_features(inputs: FeaturesInputs, store: ObjectStore) -> FeaturesOutput:
    """The inputs of the expert's head, float32, as evaluation sees them."""
    began = time.monotonic()
    tensors = {}
    network = None
    for name, rows in inputs.rows.items():
        data = load_rows(rows)
        if network is None:
            network = build_expert(
                inputs.expert,
                store,
                num_classes=inputs.num_classes,
                image_shape=data.image_shape,
                seed=0,
            ).eval()
        parts = [network.features(images) for images in data.tensor().split(BATCH)]
        tensors[name] = torch.cat(parts).float().contiguous()
    assert network is not None, "there is always a set of rows"
    store.write(inputs.key, save_tensors(tensors))
    return FeaturesOutput(width=network.num_features, seconds=time.monotonic() - began)


def write_rows(inputs: RowsInputs, store: ObjectStore) -> RowsOutput:
    """Shards of float32 rows (1, 1, D) with their labels, under the commit protocol."""
    began = time.monotonic()
    data = load_rows(inputs.rows)
    features = [load_tensors(store.read(key))[inputs.name] for key in inputs.features]
    rows_ND = torch.cat([data.tensor().flatten(1), *features], dim=1).numpy()
    size = 0
    for index in range(inputs.plan.num_shards):
        order = inputs.plan.order(index)
        size += write_shard(order, _samples(order.numbers, rows_ND, data.labels), store).bytes
    return RowsOutput(shards=inputs.plan.num_shards, bytes=size, seconds=time.monotonic() - began)


def _samples(numbers: range, rows_ND: np.ndarray, labels: np.ndarray) -> Iterator[PseudoSample]:
    for number in numbers:
        yield PseudoSample(
            number=number, image=rows_ND[number][None, None], label=int(labels[number])
        )
