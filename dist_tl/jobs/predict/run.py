"""Runs predictions: expert actors and routers predict every shard of the input."""

import time
from collections import Counter
from dataclasses import dataclass

from dist_tl.cluster.experts import ExpertPool
from dist_tl.jobs.predict.plan import STAGE, PredictPlan
from dist_tl.jobs.workers import Workers
from dist_tl.report.results import StageRecord
from dist_tl.shards.manifest import committed_indices, open_stage
from dist_tl.shards.reader import read_shard
from dist_tl.storage.objects import ObjectStore


@dataclass(frozen=True)
class PredictOutcome:
    """The predictions of all samples.

    Attributes:
        counts: "samples", "labelled" and "correct" ones, and those that missed an expert they chose
            ("rerouted").
        used: samples by expert that they passed through.
        shards, seconds: shards that this attempt predicted, and its time.
        replicas: largest number of replicas of each expert.
        lost: experts that were left out.
    """

    plan: PredictPlan
    counts: Counter[str]
    used: Counter[str]
    shards: int
    seconds: float
    replicas: dict[str, int]
    lost: tuple[str, ...]


def run(plan: PredictPlan, workers: Workers) -> PredictOutcome:
    """Predicts every shard that is not committed yet.

    Raises:
        DistTLError: the named error of an actor; committed shards are kept.
    """
    store, job, experts = workers.store, plan.job, plan.hub.experts
    open_stage(store, plan.manifest)
    committed = len(committed_indices(store, STAGE))
    began = time.time()
    pool = ExpertPool(
        job.experts,
        store,
        job.model,
        experts,
        degrade=job.degrade,
        roles=workers.session.roles,
        attempt=workers.attempt,
    )
    with pool:
        pool.answer(
            plan.source,
            plan.shards,
            on_poll=workers.session.check,
            on_done=lambda done, total: workers.progress.update(STAGE, done, total),
        )
    ended = time.time()
    workers.record(StageRecord(name=STAGE, kind="trial", started=began, ended=ended))
    counts, used = _count(store, plan.shards.num_shards)
    return PredictOutcome(
        plan=plan,
        counts=counts,
        used=used,
        shards=plan.shards.num_shards - committed,
        seconds=ended - began,
        replicas={replicas.name: replicas.most for replicas in pool.replicas},
        lost=tuple(experts[index] for index in sorted(pool.lost)),
    )


def _count(store: ObjectStore, num_shards: int) -> tuple[Counter[str], Counter[str]]:
    """Counts all predictions, one shard in memory at a time.

    Raises:
        ShardError: a shard is missing or damaged.
    """
    counts, used = Counter[str](), Counter[str]()
    for index in range(num_shards):
        for sample in read_shard(store, STAGE, index):
            entry = sample.provenance
            counts["samples"] += 1
            counts["rerouted"] += bool(entry["rerouted"])
            counts["labelled"] += "truth" in entry
            counts["correct"] += "truth" in entry and entry["truth"] == sample.label
            used.update(entry["weights"].keys())
    return counts, used
