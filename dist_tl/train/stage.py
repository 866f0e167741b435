"""Runs one training stage from its specification, on every rank of the group.

Every rank calls :func:`run_stage`; a trial calls it with a world size of 1. A stage stores its
model, its metrics and, last, its result: a stage that has a result is finished.
"""

import copy
import hashlib
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from dist_tl.datasets.images import to_float
from dist_tl.datasets.views import Views
from dist_tl.methods.pseudo.distillation import MeanTeacher
from dist_tl.seeds import derive_seed
from dist_tl.shards.order import ShardPlan
from dist_tl.shards.stream import ShardStream
from dist_tl.storage import layout
from dist_tl.storage.attempts import Attempt
from dist_tl.storage.model_files import write_model_files
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import write_record
from dist_tl.telemetry import MetricsLog
from dist_tl.train import objectives
from dist_tl.train.cached import CachedHub
from dist_tl.train.checkpoints import Checkpoints, remove_checkpoints
from dist_tl.train.engine import Engine
from dist_tl.train.feeds import Feed, MemoryRows, Rows, ShardRows, own_lanes
from dist_tl.train.hub_model import NewHub
from dist_tl.train.loop import OnProgress, StepRecord, fit, read_rows
from dist_tl.train.models import build_model, load_classifier, load_weights, model_files
from dist_tl.train.rows import RowsSpec, load_rows
from dist_tl.train.spec import StageResult, StageSpec, read_result

EVALUATION_BATCH = 512


def run_stage(
    spec: StageSpec,
    store: ObjectStore,
    *,
    rank: int,
    world_size: int,
    on_progress: OnProgress = lambda step, loss, shard: None,
    log_every: int = 10,
    attempt: Attempt | None = None,
) -> StageResult:
    """Trains, evaluates and stores one stage. A collective of all ranks.

    Resumes from the last committed checkpoint; returns at once if the stage is finished.

    Args:
        on_progress: called on every rank with the number of finished steps, the latest known loss,
            and the lowest shard that this rank has not read yet (None if it reads no shards).
        log_every: steps between two collectives that average the loss over the ranks.
        attempt: the attempt that runs the stage; a superseded attempt commits nothing.

    Raises:
        DistTLError: a named error of the data, the store, the shards or the numerics.
    """
    finished = finished_result(store, spec)
    if finished is not None:
        return finished
    with ExitStack() as resources:
        stage = _build(spec, store, rank, world_size, attempt, resources)
        state = stage.checkpoints.restore(stage.engine)
        record = _step_record(stage, log_every, on_progress)
        fit(
            stage.engine,
            _objective(spec, store, stage.engine.device),
            stage.feed,
            state,
            num_steps=spec.steps,
            checkpoints=stage.checkpoints,
            record=record,
        )
        scores = _score(stage)
    result = _result(stage, record, scores)
    _store(stage, result)
    return result


def finished_result(store: ObjectStore, spec: StageSpec) -> StageResult | None:
    """Returns the stage's result, or None if the stage is not finished.

    Removes the checkpoints of a finished stage: a process that is killed after it stored the result
    leaves them behind.

    Raises:
        CheckpointMismatchError: another specification made the result.
    """
    result = read_result(store, spec)
    if result is not None:
        remove_checkpoints(store, spec.name)
    return result


@dataclass(frozen=True)
class _Stage:
    """The state that the steps of a running stage share.

    Attributes:
        replica: complete copy of the model, to evaluate and store; the ranks of ZeRO-3 hold only
            partitions of the model under training.
        streams: the shard streams that `feed` reads.
        started: Unix time.
    """

    spec: StageSpec
    store: ObjectStore
    rank: int
    world_size: int
    attempt: Attempt | None
    replica: nn.Module
    engine: Engine
    feed: Feed
    streams: list[ShardStream]
    checkpoints: Checkpoints
    started: float

    def position(self) -> int | None:
        """Returns the lowest shard that this rank still needs, or None if it reads no shards."""
        return self.streams[0].position if self.streams else None


class _Scores(NamedTuple):
    """Class of each evaluated row and whether it is correct; see :class:`StageResult`."""

    predictions: tuple[int, ...]
    correct: tuple[bool, ...]
    last_step_correct: tuple[bool, ...] = ()


def _build(
    spec: StageSpec,
    store: ObjectStore,
    rank: int,
    world_size: int,
    attempt: Attempt | None,
    resources: ExitStack,
) -> _Stage:
    """Builds model, engine, feed and checkpoints, and seeds dropout; `resources` undoes it."""
    started = time.time()
    module = build_model(spec.model, store, image_shape=spec.image_shape, seed=spec.seed)
    replica = copy.deepcopy(module)
    engine = Engine(
        module,
        spec.engine,
        spec.optimizer,
        batch_per_rank=spec.batch_size // world_size,
        num_steps=spec.steps,
        ema_decay=spec.ema_decay,
    )
    resources.callback(engine.close)
    feed, streams = _feed(spec, store, rank, world_size, engine.device)
    for stream in streams:
        resources.callback(stream.close)
    # Dropout takes no generator; unseeded, it would depend on earlier work of this process.
    resources.enter_context(torch.random.fork_rng(devices=[]))
    torch.manual_seed(derive_seed(spec.seed, "dropout", rank))
    checkpoints = Checkpoints(
        store,
        spec.name,
        spec.checkpoints,
        fingerprint=spec.fingerprint,
        rank=rank,
        world_size=world_size,
        attempt=attempt,
    )
    return _Stage(
        spec,
        store,
        rank,
        world_size,
        attempt,
        replica=replica,
        engine=engine,
        feed=feed,
        streams=streams,
        checkpoints=checkpoints,
        started=started,
    )


def _feed(
    spec: StageSpec, store: ObjectStore, rank: int, world_size: int, device: torch.device
) -> tuple[Feed, list[ShardStream]]:
    streams: list[ShardStream] = []

    def rows(source: RowsSpec | ShardPlan, batch_size: int, purpose: str) -> Rows:
        if isinstance(source, ShardPlan):
            stream = ShardStream(
                store,
                source,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                seed=spec.seed,
                timeout_s=spec.shard_timeout_s,
            )
            streams.append(stream)
            return ShardRows(stream)
        return MemoryRows(
            load_rows(source),
            batch_size=batch_size,
            num_lanes=spec.lanes,
            lanes=own_lanes(spec.lanes, rank, world_size),
            seed=spec.seed,
            purpose=purpose,
        )

    labelled = rows(spec.labelled, spec.batch_size, "labelled order")
    unlabelled = None
    if spec.unlabelled is not None:
        unlabelled = rows(spec.unlabelled, spec.unlabelled_batch_size, "unlabelled order")
    feed = Feed(
        labelled,
        unlabelled,
        Views(spec.views),
        accumulation=spec.engine.accumulation,
        seed=spec.seed,
        device=device,
    )
    return feed, streams


def _objective(spec: StageSpec, store: ObjectStore, device: torch.device) -> objectives.Objective:
    match spec.objective:
        case objectives.SupervisedSpec():
            return objectives.supervised
        case objectives.PSSLSpec(p_ssl=config):
            return objectives.PSSL(config, spec.steps)
        case objectives.DistillationSpec(distillation=config, teacher=location):
            teacher = _teacher(spec, store, location, config.temperature)
            return objectives.Distillation(config, teacher.to(device))
        case objectives.HubSpec(loss=config):
            hub = spec.model.hub if isinstance(spec.model, CachedHub) else spec.model
            assert isinstance(hub, NewHub), "StageSpec validates this"
            return objectives.Hub(config, spec.seed, len(hub.experts))
        case objectives.ReadoutSpec():
            return objectives.ReadoutFit(spec.objective)
        case objectives.DiffusionSpec():
            return objectives.Diffusion(spec.seed)


def _teacher(
    spec: StageSpec, store: ObjectStore, location: str | tuple[str, ...], temperature: float
) -> nn.Module:
    if isinstance(location, str):
        return load_classifier(store, location, image_shape=spec.image_shape)
    teachers = [load_classifier(store, one, image_shape=spec.image_shape) for one in location]
    return MeanTeacher(teachers, temperature)


def _step_record(stage: _Stage, log_every: int, on_progress: OnProgress) -> StepRecord:
    """Creates the record of the steps; rank 0 appends to the metrics of the checkpoint."""
    key, restored = layout.metrics_key(stage.spec.name), stage.checkpoints.restored_metrics

    def write(data: bytes) -> None:
        stage.store.write(key, data)

    seconds_before = max((row["elapsed_s"] for row in read_rows(restored)), default=0.0)
    return StepRecord(
        MetricsLog(write, existing=restored) if stage.rank == 0 else None,
        stage=stage.spec.name,
        every=log_every,
        started=stage.started - seconds_before,
        position=stage.position,
        on_progress=on_progress,
    )


def _score(stage: _Stage) -> _Scores:
    """Evaluates the trained model. Leaves the weights to store in `stage.replica`."""
    stage.replica.to(stage.engine.device)
    last_step = _evaluate(stage, averaged=False)
    if stage.spec.ema_decay is None:
        return last_step
    averaged = _evaluate(stage, averaged=True)
    return averaged._replace(last_step_correct=last_step.correct)


def _evaluate(stage: _Stage, *, averaged: bool) -> _Scores:
    """Loads full weights into `stage.replica` and predicts; each rank predicts a share of rows."""
    load_weights(stage.replica, stage.engine.full_weights(averaged=averaged))
    if stage.spec.evaluate is None:
        return _Scores((), ())
    data = load_rows(stage.spec.evaluate)
    share = np.array_split(np.arange(len(data)), stage.world_size)[stage.rank]
    gathered: list[list[int]] = [[] for _ in range(stage.world_size)]
    predicted = _predict(stage.replica, data.images[share], stage.engine.device)
    dist.all_gather_object(gathered, predicted)
    predictions = tuple(prediction for part in gathered for prediction in part)
    pairs = zip(predictions, data.labels.tolist(), strict=True)
    return _Scores(predictions, tuple(prediction == label for prediction, label in pairs))


@torch.no_grad()
def _predict(network: nn.Module, images: np.ndarray, device: torch.device) -> list[int]:
    starts = range(0, len(images), EVALUATION_BATCH)
    batches = (to_float(images[i : i + EVALUATION_BATCH]).to(device) for i in starts)
    return [int(c) for batch in batches for c in network(batch).argmax(dim=1).cpu()]


def _result(stage: _Stage, record: StepRecord, scores: _Scores) -> StageResult:
    spec, ended = stage.spec, time.time()
    return StageResult(
        name=spec.name,
        fingerprint=spec.fingerprint,
        world_size=stage.world_size,
        started=stage.started,
        first_step_at=record.first_step_at,
        ended=ended,
        seconds=ended - record.started,
        steps=spec.steps,
        samples=spec.steps * (spec.batch_size + spec.unlabelled_batch_size),
        seconds_starved=stage.feed.seconds_starved,
        seconds_saving=stage.checkpoints.seconds_blocked,
        final_loss=record.last_loss,
        metrics_sha256=hashlib.sha256(record.stored()).hexdigest(),
        notes=tuple(stage.checkpoints.notes),
        predictions=scores.predictions,
        correct=scores.correct,
        last_step_correct=scores.last_step_correct,
    )


def _store(stage: _Stage, result: StageResult) -> None:
    """Stores model and result on rank 0, the result last; then removes the checkpoints."""
    if stage.rank == 0:
        if stage.attempt is not None:
            stage.attempt.check()
        name = stage.spec.name
        files = model_files(stage.replica.cpu())
        write_model_files(stage.store, layout.stage_model_prefix(name), files)
        write_record(stage.store, layout.result_key(name), result)
    dist.barrier()
    stage.checkpoints.clear()
