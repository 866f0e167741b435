"""Ray tasks of a geometric labelling: features, label tuples, shards of labelled images.

Plain functions of what is asked and the store; chunks of the pool do not depend on each other.
"""

import time
from collections.abc import Iterator

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from dist_tl.config import StrictModel
from dist_tl.datasets.spec import DataConfig
from dist_tl.methods.geometry.classes import histogram
from dist_tl.methods.geometry.controls import nearest_anchors
from dist_tl.methods.geometry.item_labels import Anchors, LabelConfig, label_items
from dist_tl.shards.order import ShardOrder, ShardPlan
from dist_tl.shards.sample import PseudoSample
from dist_tl.shards.writer import write_shard
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.models import load_classifier
from dist_tl.train.rows import RowsSpec, load_rows

BATCH = 256


class FeaturesInputs(StrictModel):
    """Last features of some rows of a data set."""

    model: str
    data: DataConfig
    first: int
    last: int
    key: str = Field(description="Where features, and their sums by class, are stored.")


class FeaturesOutput(StrictModel):
    """What was stored."""

    width: int
    seconds: float


class LabelsInputs(StrictModel):
    """Label tuples of one chunk of the pool, in several ways."""

    features: str
    anchors: str
    ways: dict[str, LabelConfig] = Field(description="By arm.")
    nearest: int | None = Field(description="Length of nearest-m labels, if they are asked for.")
    key: str = Field(description="Where the tuples are stored, by arm.")


class LabelCounts(StrictModel):
    """One way's histogram in one chunk."""

    labels: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]
    degenerate: int
    smallest_margin: float


class LabelsOutput(StrictModel):
    """Histograms by arm."""

    ways: dict[str, LabelCounts]
    seconds: float


class ShardsInputs(StrictModel):
    """Some shards of labelled pool images."""

    plan: ShardPlan
    pool: DataConfig
    labelling: str = Field(description="Where the rows and classes of all samples are.")
    indices: tuple[int, ...]


class ShardsOutput(StrictModel):
    """What was committed."""

    shards: int
    bytes: int
    seconds: float


@torch.no_grad()
def compute_features(inputs: FeaturesInputs, store: ObjectStore) -> FeaturesOutput:
    """The head's inputs, float32, and their sums over each class in float64."""
    began = time.monotonic()
    rows = load_rows(RowsSpec(data=inputs.data))
    network = load_classifier(store, inputs.model, image_shape=rows.image_shape).eval()
    parts = [
        network.features(rows.tensor(np.arange(start, min(start + BATCH, inputs.last))))
        for start in range(inputs.first, inputs.last, BATCH)
    ]
    features_ND = torch.cat(parts).float()
    labels_N = torch.from_numpy(rows.labels[inputs.first : inputs.last])
    one_hot_NC = torch.nn.functional.one_hot(labels_N, rows.num_classes).double()
    tensors = {
        "features": features_ND.contiguous(),
        "sums": (one_hot_NC.T @ features_ND.double()).contiguous(),
        "counts": one_hot_NC.sum(dim=0),
    }
    store.write(inputs.key, save_tensors(tensors))
    return FeaturesOutput(width=features_ND.shape[1], seconds=time.monotonic() - began)


def label_chunk(inputs: LabelsInputs, store: ObjectStore) -> LabelsOutput:
    """Tuples of every way, and how often each occurs."""
    began = time.monotonic()
    features_ND = load_tensors(store.read(inputs.features))["features"]
    anchors = Anchors.of(load_tensors(store.read(inputs.anchors))["points"])
    tensors, ways = {}, {}
    for arm, config in inputs.ways.items():
        found = label_items(features_ND, anchors, config)
        tensors[arm] = found.tuples_Nm
        margin = float(found.margin_N.min()) if len(features_ND) else 0.0
        ways[arm] = _counted(found.tuples_Nm, int(found.degenerate_N.sum()), margin)
    if inputs.nearest is not None:
        tuples_Nm = nearest_anchors(features_ND, anchors, inputs.nearest).contiguous()
        tensors["nearest_m"] = tuples_Nm
        ways["nearest_m"] = _counted(tuples_Nm, 0, 0.0)
    store.write(inputs.key, save_tensors({k: v.contiguous() for k, v in tensors.items()}))
    return LabelsOutput(ways=ways, seconds=time.monotonic() - began)


def _counted(tuples_Nm: torch.Tensor, degenerate: int, margin: float) -> LabelCounts:
    counts = sorted(histogram(tuples_Nm).items())
    return LabelCounts(
        labels=tuple(label for label, _ in counts),
        counts=tuple(count for _, count in counts),
        degenerate=degenerate,
        smallest_margin=margin if np.isfinite(margin) else 0.0,
    )


def write_labelled_shards(inputs: ShardsInputs, store: ObjectStore) -> ShardsOutput:
    """Pool images with their classes, as plain shards under the commit protocol."""
    began = time.monotonic()
    images = load_rows(RowsSpec(data=inputs.pool)).images
    labelling = load_tensors(store.read(inputs.labelling))
    rows, classes = labelling["rows"].tolist(), labelling["classes"].tolist()
    size = 0
    for index in inputs.indices:
        order = inputs.plan.order(index)
        entry = write_shard(order, _samples(order, images, rows, classes), store)
        size += entry.bytes
    return ShardsOutput(shards=len(inputs.indices), bytes=size, seconds=time.monotonic() - began)


def _samples(
    order: ShardOrder, images: np.ndarray, rows: list[int], classes: list[int]
) -> Iterator[PseudoSample]:
    for number in order.numbers:
        yield PseudoSample(
            number=number,
            image=images[rows[number]],
            label=classes[number],
            provenance={"stage": order.stage, "pool_row": rows[number]},
        )
