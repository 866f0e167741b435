"""Runs a geometric labelling: features, anchors, labels, shards, base models, transfer."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from dist_tl.cluster.anchors import choose_anchors_on_ray
from dist_tl.config import fingerprint
from dist_tl.errors import ConfigError
from dist_tl.jobs.geometric_labels.plan import ANCHORS, GeometricLabelsPlan, Labelling, of_classes
from dist_tl.jobs.geometric_labels.tasks import (
    FeaturesOutput,
    LabelCounts,
    LabelsOutput,
    ShardsOutput,
    compute_features,
    label_chunk,
    write_labelled_shards,
)
from dist_tl.jobs.versions import versions
from dist_tl.jobs.workers import Workers
from dist_tl.methods.geometry.classes import DROPPED, ClassTable, Label, RareConfig
from dist_tl.methods.geometry.controls import kmeans_labels, shuffled_labels
from dist_tl.methods.geometry.divergence import (
    activation_distribution,
    js_divergence,
    kl_divergence,
)
from dist_tl.seeds import derive_seed, numpy_rng
from dist_tl.shards.manifest import StageManifest, open_stage
from dist_tl.storage import layout
from dist_tl.train.rows import RowsSpec, load_rows
from dist_tl.train.spec import StageResult, StageSpec


@dataclass(frozen=True)
class Pair:
    """One (source, target) pair of the divergence forecast; divergences in nats."""

    source: str
    target: str
    js: float
    kl_target_source: float
    kl_source_target: float
    error: float


@dataclass(frozen=True)
class GeometricLabelsOutcome:
    """Results of all trainings and label tasks; `tuned` is by arm, rate and repeat."""

    plan: GeometricLabelsPlan
    num_anchors: int
    tables: dict[str, ClassTable]
    counted: dict[str, LabelCounts]
    labellings: dict[str, Labelling]
    bases: dict[str, StageResult]
    tuned: dict[tuple[str, float, int], StageResult]
    pairs: tuple[Pair, ...]


def run(plan: GeometricLabelsPlan, workers: Workers) -> GeometricLabelsOutcome:
    """Runs every stage and task that has no output yet.

    Raises:
        DistTLError: a named error; finished stages and tasks are kept.
    """
    steps = _Steps(plan, workers)
    steps.features()
    num_anchors = steps.anchors()
    tables, counted = steps.labels()
    labellings = steps.labellings(tables)
    bases, tuned = steps.arms(labellings)
    pairs = steps.pairs()
    return GeometricLabelsOutcome(
        plan=plan,
        num_anchors=num_anchors,
        tables=tables,
        counted=counted,
        labellings=labellings,
        bases=bases,
        tuned=tuned,
        pairs=pairs,
    )


class _Steps:
    """The steps of one run, in order."""

    def __init__(self, plan: GeometricLabelsPlan, workers: Workers) -> None:
        self.plan, self.job = plan, plan.job
        self.workers, self.store = workers, workers.store

    def features(self) -> None:
        """The extractor, and what it sees in the pool, the anchors' data and the target."""
        self.workers.train_apart("extractor", self.plan.extractors())
        tasks = self.plan.features("pool", self.job.pool)
        if self.job.anchors.data is not None:
            tasks += self.plan.features("anchors", self.job.anchors.data)
        if self.job.pairs is not None:
            tasks += self.plan.features("target", self.job.target.data)
        self.workers.run_tasks("features", compute_features, tasks, FeaturesOutput)

    def anchors(self) -> int:
        """Store the anchors; they follow from the features alone."""
        if self.job.anchors.data is not None:
            parts = [self._read(task.inputs.key) for task in self._tasks("anchors")]
            sums, counts = (
                torch.stack([p[n] for p in parts]).sum(dim=0) for n in ("sums", "counts")
            )
            points_MD = sums / counts[:, None]
        else:
            points_MD = self._chosen_points()
        if self.job.m > len(points_MD):
            raise ConfigError(f"m: {self.job.m} anchors a label, and there are {len(points_MD)}")
        self.store.write(ANCHORS, save_tensors({"points": points_MD.contiguous()}))
        return len(points_MD)

    def _chosen_points(self) -> Tensor:
        assert self.job.anchors.count is not None, "the specification asks for one of both"
        tasks = self._tasks("pool")
        chosen = choose_anchors_on_ray(
            self.store.url,
            [task.inputs.key for task in tasks],
            [task.inputs.first for task in tasks],
            self.job.anchors.count,
            self.job.trials,
        )
        return torch.stack([proposal.point_D for proposal in chosen])

    def labels(self) -> tuple[dict[str, ClassTable], dict[str, LabelCounts]]:
        """Tuples and histograms of every chunk, and one class table a way."""
        answers = self.workers.run_tasks("labels", label_chunk, self.plan.labels(), LabelsOutput)
        totals = {way: _total([answer.ways[way] for answer in answers]) for way in answers[0].ways}
        tables = {
            way: ClassTable.of(dict(zip(total.labels, total.counts, strict=True)), self.job.rare)
            for way, total in totals.items()
        }
        for way, table in tables.items():
            if not table.names:
                raise ConfigError(self._too_rare(way))
        return tables, totals

    def _too_rare(self, name: str) -> str:
        return (
            f"{name}: every class of the pool is rarer than rare.min_count = "
            f"{self.job.rare.min_count}; lower it, shorten m, or use a larger pool"
        )

    def labellings(self, tables: dict[str, ClassTable]) -> dict[str, Labelling]:
        """Every arm's labels of the pool, stored and written as shards."""
        found = {arm: self._classes(arm, tables) for arm in self.job.arms if arm != "scratch"}
        labellings = {arm: self._store(arm, classes_N) for arm, classes_N in found.items()}
        self._write_shards(list(labellings.values()))
        return labellings

    def _classes(self, arm: str, tables: dict[str, ClassTable]) -> Tensor:
        if arm in tables:
            return self._looked_up(arm, tables[arm])
        if arm == "human_labels":
            return torch.from_numpy(load_rows(RowsSpec(data=self.job.pool)).labels)
        geometric_N = self._looked_up("g2l_near_max", tables["g2l_near_max"])
        if arm == "random_labels":
            return shuffled_labels(geometric_N, numpy_rng(self.job.seed, "random labels"))
        seed = derive_seed(self.job.seed, "k-means")
        return kmeans_labels(self._pool_features(), len(tables["g2l_near_max"].names), seed=seed)

    def _looked_up(self, way: str, table: ClassTable) -> Tensor:
        parts = [self._read(task.inputs.key)[way] for task in self.plan.labels()]
        return torch.cat([table.lookup(part) for part in parts])

    def _store(self, name: str, classes_N: Tensor) -> Labelling:
        """Kept items in a seeded order, so that the first pass over shards is shuffled too."""
        order = numpy_rng(self.job.seed, "pool order").permutation(len(classes_N))
        rows = torch.from_numpy(order[classes_N.numpy()[order] != DROPPED])
        if len(rows) == 0:
            raise ConfigError(self._too_rare(name))
        tensors = {"rows": rows.contiguous(), "classes": classes_N[rows].long().contiguous()}
        key = f"{layout.stage_prefix(f'labelling-{name}')}/labelling.safetensors"
        data = save_tensors(tensors)
        self.store.write(key, data)
        digest = fingerprint([rows.tolist(), tensors["classes"].tolist()])
        return Labelling(name, len(rows), int(tensors["classes"].max()) + 1, key, digest)

    def _write_shards(self, labellings: list[Labelling]) -> None:
        for labelling in labellings:
            manifest = StageManifest(
                plan=self.plan.shard_plan(labelling),
                kind="geometric_labels",
                condition="none",
                image_shape=self.plan.image_shape,
                num_classes=max(2, labelling.num_classes),
                generator="pool",
                created_by=versions(),
            )
            open_stage(self.store, manifest)
        tasks = [task for labelling in labellings for task in self.plan.shards(labelling)]
        name = "shards" if labellings and labellings[0].name in self.job.arms else "pair shards"
        self.workers.run_tasks(name, write_labelled_shards, tasks, ShardsOutput)

    def arms(
        self, labellings: dict[str, Labelling]
    ) -> tuple[dict[str, StageResult], dict[tuple[str, float, int], StageResult]]:
        """Base models, then every arm at every rate and repeat on the target."""
        names = list(labellings)
        bases = self.workers.train([self.plan.base(labellings[name]) for name in names])
        keys = self.plan.arm_keys()
        tuned = self.workers.train([self.plan.arm(*key) for key in keys])
        return dict(zip(names, bases, strict=True)), dict(zip(keys, tuned, strict=True))

    def pairs(self) -> tuple[Pair, ...]:
        """Divergence and error of every (source, target) pair, with near/max labels."""
        pairs = self.job.pairs
        if pairs is None:
            return ()
        labellings = {}
        for source in pairs.sources:
            name = "pair-" + "".join(source)
            labellings[source] = self._store(name, self._source_classes(source))
        self._write_shards(list(labellings.values()))
        self.workers.train([self.plan.base(labelling) for labelling in labellings.values()])
        rate = self.job.rates[len(self.job.rates) // 2]
        found, specs, keys = [], [], []
        for source, labelling in labellings.items():
            for target in pairs.targets:
                data = of_classes(self.job.target.data, target)
                for repeat in range(pairs.seeds):
                    name = f"{labelling.name}-to-{''.join(target)}"
                    specs.append(self._pair_stage(name, repeat, rate, labelling, data))
                    keys.append((source, target))
        errors: dict[tuple, list[float]] = {}
        for key, result in zip(keys, self.workers.train(specs), strict=True):
            errors.setdefault(key, []).append(1 - result.accuracy)
        for (source, target), values in errors.items():
            p_source = self._distribution("pool", self.job.pool, source)
            p_target = self._distribution("target", self.job.target.data, target)
            found.append(
                Pair(
                    source="".join(source),
                    target="".join(target),
                    js=js_divergence(p_target, p_source),
                    kl_target_source=kl_divergence(p_target, p_source),
                    kl_source_target=kl_divergence(p_source, p_target),
                    error=float(np.mean(values)),
                )
            )
        return tuple(found)

    def _pair_stage(
        self, name: str, repeat: int, rate: float, labelling: Labelling, data: object
    ) -> StageSpec:
        return self.plan.fine_tuning(name, repeat, rate, base=labelling.name, data=data)

    def _source_classes(self, source: tuple[str, ...]) -> Tensor:
        """Near/max labels of the pool's items of some classes, numbered among themselves."""
        member_N = self._members(self.job.pool, source)
        tuples_Nm = torch.cat(
            [self._read(task.inputs.key)["g2l_near_max"] for task in self.plan.labels()]
        )
        counts: Counter[Label] = Counter(tuple(row) for row in tuples_Nm[member_N].tolist())
        table = ClassTable.of(counts, RareConfig(**self.job.rare.model_dump()))
        classes_N = torch.full((len(tuples_Nm),), DROPPED)
        classes_N[member_N] = table.lookup(tuples_Nm[member_N])
        return classes_N

    def _distribution(self, name: str, data: object, classes: tuple[str, ...]) -> Tensor:
        parts = [self._read(task.inputs.key)["features"] for task in self._tasks(name)]
        return activation_distribution(torch.cat(parts)[self._members(data, classes)])

    def _members(self, data: object, classes: tuple[str, ...]) -> Tensor:
        rows = load_rows(RowsSpec(data=data))
        wanted = [rows.class_names.index(name) for name in classes]
        return torch.from_numpy(np.isin(rows.labels, wanted))

    def _pool_features(self) -> Tensor:
        return torch.cat([self._read(task.inputs.key)["features"] for task in self._tasks("pool")])

    def _tasks(self, name: str) -> list:
        data = {
            "pool": self.job.pool,
            "anchors": self.job.anchors.data,
            "target": self.job.target.data,
        }
        return self.plan.features(name, data[name])

    def _read(self, key: str) -> dict[str, Tensor]:
        return load_tensors(self.store.read(key))


def _total(parts: list[LabelCounts]) -> LabelCounts:
    total: Counter[Label] = Counter()
    for part in parts:
        total.update(dict(zip(part.labels, part.counts, strict=True)))
    ordered = sorted(total.items())
    return LabelCounts(
        labels=tuple(label for label, _ in ordered),
        counts=tuple(count for _, count in ordered),
        degenerate=sum(part.degenerate for part in parts),
        smallest_margin=min(part.smallest_margin for part in parts),
    )
