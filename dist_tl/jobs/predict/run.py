"""Runs predictions: expert actors and routers answer every shard of the input."""

import time
from dataclasses import dataclass

from dist_tl.cluster.experts import ExpertPool, Replicas
from dist_tl.jobs.predict.plan import STAGE, PredictPlan, job_input
from dist_tl.jobs.workers import Workers
from dist_tl.report.results import StageRecord
from dist_tl.shards.manifest import committed_indices, open_stage
from dist_tl.shards.order import ShardPlan
from dist_tl.shards.reader import read_shard
from dist_tl.storage.objects import ObjectStore


@dataclass(frozen=True)
class Tally:
    """Counted from all committed predictions.

    Attributes:
        used: samples that passed through each expert.
        labelled, correct: where the samples had labels.
        rerouted: samples that missed an expert they chose.
    """

    samples: int
    used: dict[str, int]
    labelled: int
    correct: int
    rerouted: int


@dataclass(frozen=True)
class PredictOutcome:
    """The predictions of all samples.

    Attributes:
        answered: shards that this attempt predicted; the others were committed before.
        seconds: spent on them.
        lost: names of the experts that were left out.
    """

    plan: PredictPlan
    tally: Tally
    answered: int
    seconds: float
    replicas: tuple[Replicas, ...]
    lost: tuple[str, ...]


def run(plan: PredictPlan, workers: Workers) -> PredictOutcome:
    """Predicts every shard that is not committed yet.

    Raises:
        DistTLError: the named error of an actor; committed shards are kept.
    """
    store, job, experts = workers.store, plan.job, plan.hub.experts
    open_stage(store, plan.manifest())
    before = len(committed_indices(store, STAGE))
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
            job_input(job),
            plan.shards,
            on_poll=workers.session.check,
            on_done=lambda done, total: workers.progress.update("predictions", done, total),
        )
    ended = time.time()
    workers.record(StageRecord(name=STAGE, kind="trial", started=began, ended=ended))
    return PredictOutcome(
        plan=plan,
        tally=tally(store, plan.shards),
        answered=plan.shards.num_shards - before,
        seconds=ended - began,
        replicas=tuple(pool.replicas),
        lost=tuple(experts[i] for i in sorted(pool.lost)),
    )


def tally(store: ObjectStore, plan: ShardPlan) -> Tally:
    """Count all predictions, a shard at a time.

    Raises:
        ShardError: a shard is missing or damaged.
    """
    samples = labelled = correct = rerouted = 0
    used: dict[str, int] = {}
    for index in range(plan.num_shards):
        for sample in read_shard(store, plan.stage, index):
            samples += 1
            about = sample.provenance
            rerouted += bool(about["rerouted"])
            for name in about["weights"]:
                used[name] = used.get(name, 0) + 1
            if "truth" in about:
                labelled += 1
                correct += about["truth"] == sample.label
    return Tally(samples, used, labelled, correct, rerouted)
