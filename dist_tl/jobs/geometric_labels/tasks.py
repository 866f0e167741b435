"""Ray tasks of a geometric labelling: features, label tuples, shards of labelled images.

Chunks of the pool are independent of each other.
"""

import time

import numpy as np
import torch
from pydantic import Field

from dist_tl.config import StrictModel
from dist_tl.jobs.geometric_labels.plan import (
    ANCHORS,
    SHARDS_PER_TASK,
    FeaturesInputs,
    GeometricLabelsPlan,
    LabelsInputs,
    ShardsInputs,
)
from dist_tl.jobs.teacher import teacher_location
from dist_tl.methods.geometry.controls import nearest_anchors
from dist_tl.methods.geometry.item_labels import Anchors, label_items
from dist_tl.methods.geometry.pool import class_sums
from dist_tl.shards.sample import PseudoSample
from dist_tl.shards.writer import write_shard
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.tensors import read_tensors, write_tensors
from dist_tl.train.models import load_classifier
from dist_tl.train.rows import RowsSpec, load_rows

BATCH = 256


class TaskOutput(StrictModel):
    """Output of a task that only writes to the store."""

    seconds: float


class LabelsOutput(StrictModel):
    """Summary of the stored label tuples."""

    degenerate: dict[str, int] = Field(description="Number of degenerate labels by arm.")
    seconds: float


@torch.no_grad()
def compute_features(inputs: FeaturesInputs, store: ObjectStore) -> TaskOutput:
    """Stores the head's inputs in float32, and their sums over each class in float64."""
    began, rows = time.monotonic(), load_rows(RowsSpec(data=inputs.data))
    location = teacher_location(inputs.job.extractor)
    network = load_classifier(store, location, image_shape=rows.image_shape).eval()
    parts = [
        network.features(rows.tensor(np.arange(start, min(start + BATCH, inputs.last))))
        for start in range(inputs.first, inputs.last, BATCH)
    ]
    features_ND = torch.cat(parts).float()
    labels_N = torch.from_numpy(rows.labels[inputs.first : inputs.last])
    sums = class_sums(features_ND, labels_N, rows.num_classes)
    write_tensors(store, inputs.key, {"features": features_ND.contiguous(), **sums})
    return TaskOutput(seconds=time.monotonic() - began)


def label_chunk(inputs: LabelsInputs, store: ObjectStore) -> LabelsOutput:
    """Stores the label tuples of a chunk for every arm that labels with anchors."""
    began, job = time.monotonic(), inputs.job
    features_ND = read_tensors(store, inputs.features)["features"]
    anchors = Anchors.of(read_tensors(store, ANCHORS)["points"])
    tuples, degenerate = {}, {}
    for arm in job.g2l_arms:
        labels = label_items(features_ND, anchors, job.label_config(arm))
        tuples[arm] = labels.tuples_Nm.contiguous()
        degenerate[arm] = int(labels.degenerate_N.sum())
    if "nearest_m" in job.arms:
        tuples["nearest_m"] = nearest_anchors(features_ND, anchors, job.m).contiguous()
        degenerate["nearest_m"] = 0
    write_tensors(store, inputs.key, tuples)
    return LabelsOutput(degenerate=degenerate, seconds=time.monotonic() - began)


def write_labelled_shards(inputs: ShardsInputs, store: ObjectStore) -> TaskOutput:
    """Writes pool images with their classes as shards, under the commit protocol."""
    began = time.monotonic()
    plan = GeometricLabelsPlan(inputs.job).shard_plan(inputs.labelling)
    images = load_rows(RowsSpec(data=inputs.job.pool)).images
    labelling = read_tensors(store, inputs.labelling.key)
    rows, classes = labelling["rows"].tolist(), labelling["classes"].tolist()
    for index in range(inputs.first, min(inputs.first + SHARDS_PER_TASK, plan.num_shards)):
        order = plan.order(index)
        samples = (
            PseudoSample(
                number=number,
                image=images[rows[number]],
                label=classes[number],
                provenance={"stage": order.stage, "pool_row": rows[number]},
            )
            for number in order.numbers
        )
        write_shard(order, samples, store)
    return TaskOutput(seconds=time.monotonic() - began)
