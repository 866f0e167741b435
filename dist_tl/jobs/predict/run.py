"""The predict job: a stored hub answers a data set, its experts spread over the cluster."""

import time
from dataclasses import dataclass

from dist_tl.cluster.experts import ExpertPool, Replicas
from dist_tl.cluster.inputs import RowsInput, StageInput, input_plan, input_shape
from dist_tl.cluster.session import RaySession
from dist_tl.config import fingerprint
from dist_tl.errors import ConfigError
from dist_tl.jobs.predict.spec import PredictJob
from dist_tl.jobs.versions import versions
from dist_tl.report.results import StageRecord
from dist_tl.shards.manifest import StageManifest, committed_indices, open_stage
from dist_tl.shards.order import ShardPlan
from dist_tl.shards.reader import read_shard
from dist_tl.storage.attempts import Attempt
from dist_tl.storage.objects import ObjectStore
from dist_tl.telemetry import Progress
from dist_tl.train.hub_model import HubFile, check_hub, hub_fingerprint
from dist_tl.train.rows import RowsSpec

STAGE = "predictions"


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
    """What became of all samples.

    Attributes:
        answered: shards that this start answered; the others were there already.
        seconds: of answering them.
    """

    job: PredictJob
    about: HubFile
    plan: ShardPlan
    tally: Tally
    answered: int
    seconds: float
    replicas: tuple[Replicas, ...]
    lost: tuple[str, ...]
    stages: tuple[StageRecord, ...]
    peak_memory_bytes: int


def check_predict(job: PredictJob, store: ObjectStore) -> tuple[HubFile, ShardPlan]:
    """The hub and the plan of its predictions.

    Raises:
        ConfigError: there is no such hub or input, or they do not fit.
    """
    about = check_hub(store, job.model)
    source = job_input(job)
    shape = tuple(input_shape(source))
    if shape != tuple(about.image_shape):
        raise ConfigError(
            f"the hub at {job.model} takes images of (channels, height, width) "
            f"{tuple(about.image_shape)}, the input has {shape}; set its size and channels"
        )
    unknown = sorted(set(job.experts.resources) - set(about.experts))
    if unknown:
        raise ConfigError(
            f"experts.resources: the hub has no expert {unknown[0]}; it has "
            f"{', '.join(about.experts)}"
        )
    needed = job.experts.min * len(about.experts) * job.experts.cpus
    needed += job.experts.routers * job.experts.router_cpus
    if job.session.num_cpus < needed:
        raise ConfigError(
            f"session.num_cpus: {len(about.experts)} experts and {job.experts.routers} routers "
            f"need {needed:g}, got {job.session.num_cpus}. These are shares, not cores: more of "
            "them than the machine has are fine"
        )
    given = input_plan(source)
    plan = given.model_copy(
        update={
            "stage": STAGE,
            "purpose": STAGE,
            "format": "npy",
            "fingerprint": fingerprint(
                [hub_fingerprint(store, job.model), source.model_dump(mode="json")]
            ),
        }
    )
    return about, plan


def job_input(job: PredictJob) -> StageInput | RowsInput:
    """Where the samples are."""
    if job.shards is not None:
        # Actors have working folders of their own: a path is made absolute here.
        return job.shards.model_copy(update={"run": ObjectStore(job.shards.run).url})
    assert job.data is not None, "the job has one of both"
    return RowsInput(rows=RowsSpec(data=job.data), samples_per_shard=job.samples_per_shard)


def run_predict(job: PredictJob, attempt: Attempt, progress: Progress) -> PredictOutcome:
    """Answer every shard that has no predictions yet.

    Raises:
        ConfigError: the job cannot work; nothing was started.
        DistTLError: the named error that an actor met; what is committed stays.
    """
    store = attempt.store
    about, plan = check_predict(job, store)
    open_stage(store, _manifest(plan, about))
    before = len(committed_indices(store, STAGE))
    progress.say("starting Ray, the experts and their routers")
    with RaySession(job.session, watch=attempt.poll) as session:
        began = time.time()
        pool = ExpertPool(
            job.experts,
            store,
            job.model,
            about.experts,
            degrade=job.degrade,
            roles=job.session.roles,
            attempt=attempt.number,
        )
        with pool:
            pool.answer(
                job_input(job),
                plan,
                on_poll=session.check,
                on_done=lambda done, total: progress.update("predictions", done, total),
            )
        ended = time.time()
        memory = session.peak_memory_bytes
    return PredictOutcome(
        job=job,
        about=about,
        plan=plan,
        tally=tally(store, plan),
        answered=plan.num_shards - before,
        seconds=ended - began,
        replicas=tuple(pool.replicas),
        lost=tuple(about.experts[i] for i in sorted(pool.lost)),
        stages=(StageRecord(name=STAGE, kind="trial", started=began, ended=ended),),
        peak_memory_bytes=memory,
    )


def _manifest(plan: ShardPlan, about: HubFile) -> StageManifest:
    return StageManifest(
        plan=plan,
        kind="predictions",
        condition="none",
        image_shape=(about.num_classes, 1, 1),
        num_classes=about.num_classes,
        generator="hub",
        created_by=versions(),
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
