"""Features and labels of one run: read as tensors, stored as classes, written as shards."""

from collections.abc import Iterable

import torch
from torch import Tensor

from dist_tl.config import fingerprint
from dist_tl.jobs.geometric_labels.plan import GeometricLabelsPlan, Labelling
from dist_tl.jobs.geometric_labels.tasks import TaskOutput, write_labelled_shards
from dist_tl.jobs.versions import versions
from dist_tl.jobs.workers import Workers
from dist_tl.methods.geometry.pool import kept_rows
from dist_tl.seeds import numpy_rng
from dist_tl.shards.manifest import StageManifest, open_stage
from dist_tl.storage.tensors import read_tensors, write_tensors


class PoolLabels:
    """Features, label tuples and labellings in the store of a run.

    Shape suffixes: N = items, D = feature width, m = length of a label.
    """

    def __init__(self, plan: GeometricLabelsPlan, workers: Workers) -> None:
        self.plan, self._workers, self._store = plan, workers, workers.store

    def features(self, name: str) -> Tensor:
        """Returns the (N, D) features of a data set."""
        keys = [task.inputs.key for task in self.plan.features(name)]
        return torch.cat([read_tensors(self._store, key)["features"] for key in keys])

    def tuples(self, arm: str) -> Tensor:
        """Returns the (N, m) label tuples of the pool."""
        keys = [task.inputs.key for task in self.plan.labels()]
        return torch.cat([read_tensors(self._store, key)[arm] for key in keys])

    def store(self, name: str, classes_N: Tensor) -> Labelling:
        """Stores the classes of all items that are not dropped.

        Their seeded random order shuffles the first pass over the shards too.
        """
        rows = kept_rows(classes_N, numpy_rng(self.plan.job.seed, "pool order")).contiguous()
        classes = classes_N[rows].long().contiguous()
        labelling = Labelling(
            name=name,
            num_samples=len(rows),
            num_classes=int(classes.max()) + 1,
            digest=fingerprint([rows.tolist(), classes.tolist()]),
        )
        write_tensors(self._store, labelling.key, {"rows": rows, "classes": classes})
        return labelling

    def write_shards(self, phase: str, labellings: Iterable[Labelling]) -> None:
        """Writes the shards of labellings that are not committed yet."""
        tasks = []
        for labelling in labellings:
            manifest = StageManifest(
                plan=self.plan.shard_plan(labelling),
                kind="geometric_labels",
                condition="none",
                image_shape=self.plan.pool.image_shape,
                num_classes=max(2, labelling.num_classes),
                generator="pool",
                created_by=versions(),
            )
            open_stage(self._store, manifest)
            tasks += self.plan.shards(labelling)
        self._workers.run_tasks(phase, write_labelled_shards, tasks, TaskOutput)
