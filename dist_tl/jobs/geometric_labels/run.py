"""Runs a geometric labelling: features, anchors, labels, shards, base models, transfer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_tl.cluster.anchors import choose_anchors_on_ray
from dist_tl.errors import ConfigError
from dist_tl.jobs.geometric_labels.labelling import PoolLabels
from dist_tl.jobs.geometric_labels.pairs import measure_pairs
from dist_tl.jobs.geometric_labels.plan import ANCHORS, GeometricLabelsPlan, Labelling
from dist_tl.jobs.geometric_labels.spec import BASELINE
from dist_tl.jobs.geometric_labels.tasks import (
    LabelsOutput,
    TaskOutput,
    compute_features,
    label_chunk,
)
from dist_tl.jobs.workers import Workers
from dist_tl.methods.geometry.classes import ClassTable
from dist_tl.methods.geometry.controls import kmeans_labels, shuffled_labels
from dist_tl.methods.geometry.pairs import Pair
from dist_tl.methods.geometry.pool import class_means, class_table
from dist_tl.seeds import derive_seed, numpy_rng
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.tensors import read_tensors, write_tensors
from dist_tl.train.spec import StageResult


@dataclass(frozen=True)
class GeometricLabelsOutcome:
    """Results of all training stages and label tasks.

    Attributes:
        tables: classes of the label tuples, by arm.
        degenerate: number of degenerate labels, by arm.
        tuned: by arm, learning rate and repeat.
    """

    plan: GeometricLabelsPlan
    num_anchors: int
    tables: dict[str, ClassTable]
    degenerate: dict[str, int]
    labellings: dict[str, Labelling]
    bases: dict[str, StageResult]
    tuned: dict[tuple[str, float, int], StageResult]
    pairs: tuple[Pair, ...]


def run(plan: GeometricLabelsPlan, workers: Workers) -> GeometricLabelsOutcome:
    """Runs every stage and task that has no output yet.

    Raises:
        DistTLError: a named error; finished stages and tasks are kept.
    """
    job, labels = plan.job, PoolLabels(plan, workers)
    workers.train_apart("extractor", plan.extractors())
    tasks = [task for name in plan.data_sets for task in plan.features(name)]
    workers.run_tasks("features", compute_features, tasks, TaskOutput)
    num_anchors = _store_anchors(plan, workers.store)
    outputs = workers.run_tasks("labels", label_chunk, plan.labels(), LabelsOutput)
    arms = list(outputs[0].degenerate)
    tables = {arm: class_table(arm, labels.tuples(arm), job.rare) for arm in arms}
    labelled = [arm for arm in job.arms if arm != BASELINE]
    labellings = {arm: labels.store(arm, _classes(arm, labels, tables)) for arm in labelled}
    labels.write_shards("shards", labellings.values())
    bases = workers.train([plan.base(labelling) for labelling in labellings.values()])
    stages = plan.arms()
    tuned = workers.train(list(stages.values()))
    return GeometricLabelsOutcome(
        plan=plan,
        num_anchors=num_anchors,
        tables=tables,
        degenerate={arm: sum(output.degenerate[arm] for output in outputs) for arm in arms},
        labellings=labellings,
        bases=dict(zip(labellings, bases, strict=True)),
        tuned=dict(zip(stages, tuned, strict=True)),
        pairs=measure_pairs(labels, workers),
    )


def _store_anchors(plan: GeometricLabelsPlan, store: ObjectStore) -> int:
    """Stores the anchors, which follow from the features alone; returns their number."""
    job = plan.job
    if job.anchors.count is None:
        keys = [task.inputs.key for task in plan.features("anchors")]
        points_MD = class_means([read_tensors(store, key) for key in keys])
    else:
        chunks = [task.inputs for task in plan.features("pool")]
        proposals = choose_anchors_on_ray(
            store.url,
            [chunk.key for chunk in chunks],
            [chunk.first for chunk in chunks],
            job.anchors.count,
            job.trials,
        )
        points_MD = torch.stack([proposal.point_D for proposal in proposals])
    if job.m > len(points_MD):
        raise ConfigError(f"m: {job.m} anchors a label, and there are {len(points_MD)}")
    write_tensors(store, ANCHORS, {"points": points_MD.contiguous()})
    return len(points_MD)


def _classes(arm: str, labels: PoolLabels, tables: dict[str, ClassTable]) -> Tensor:
    """Returns an arm's class of every pool item, int64 (N,)."""
    job = labels.plan.job
    if arm in tables:
        return tables[arm].lookup(labels.tuples(arm))
    if arm == "human_labels":
        return torch.from_numpy(labels.plan.pool.labels)
    geometric = tables["g2l_near_max"]
    if arm == "kmeans":
        seed = derive_seed(job.seed, "k-means")
        return kmeans_labels(labels.features("pool"), len(geometric.names), seed=seed)
    rng = numpy_rng(job.seed, "random labels")
    return shuffled_labels(geometric.lookup(labels.tuples("g2l_near_max")), rng)
