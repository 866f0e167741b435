"""One training stage, start to end, as a function of its specification and the store.

Every rank calls :func:`run_stage`; so does a lone trial with a world of one. What a stage leaves
is its model, its metrics and, last, its result: a stage with a result is done.
"""

import copy
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

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
from dist_tl.storage.objects import ObjectStore
from dist_tl.telemetry import MetricsLog
from dist_tl.train import objectives
from dist_tl.train.cached import CachedHub
from dist_tl.train.checkpoints import Checkpoints
from dist_tl.train.engine import Engine
from dist_tl.train.feeds import Feed, MemoryRows, Rows, ShardRows, own_lanes
from dist_tl.train.hub_model import NewHub
from dist_tl.train.loop import OnProgress, StepRecord, fit, read_rows
from dist_tl.train.models import build_model, load_classifier, load_weights, model_files
from dist_tl.train.rows import RowsSpec, load_rows
from dist_tl.train.spec import StageResult, StageSpec, read_result

EVALUATION_BATCH = 512
logger = logging.getLogger(__name__)


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
    """Train, evaluate and store one stage; a collective of all ranks.

    Goes on from the stage's last committed checkpoint; returns at once if the stage is done.

    Args:
        on_progress: called on every rank with the steps done, the latest known loss, and the lowest
            shard that this rank still needs for the first time (None where it reads no shards).
        log_every: steps between two collectives that average the loss over the ranks.
        attempt: the start of the run that this belongs to; nothing is committed after a later one.

    Raises:
        DistTLError: a named error of the data, the store, the shards or the numbers.
    """
    done = read_result(store, spec)
    if done is not None:
        return done
    started = time.time()
    module = build_model(spec.model, store, image_shape=spec.image_shape, seed=spec.seed)
    # What is evaluated and stored; the module under training may be in pieces (ZeRO-3).
    whole = copy.deepcopy(module)
    with ExitStack() as stack:
        engine = stack.enter_context(_engine(spec, module, world_size))
        feed, streams = _feed(spec, store, rank, world_size, engine.device)
        for stream in streams:
            stack.callback(stream.close)
        # Dropout takes no generator; without this it would depend on what the process did before.
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(derive_seed(spec.seed, "dropout", rank))
        checkpoints = _checkpoints(spec, store, rank, world_size, attempt)
        state = checkpoints.restore(engine)
        earlier = store.read_or_none(layout.metrics_key(spec.name)) or b""
        seconds_before = _seconds_until(earlier, state.step)
        record = StepRecord(
            _metrics(spec, store, earlier, state.step) if rank == 0 else None,
            stage=spec.name,
            every=log_every,
            started=started - seconds_before,
            position=lambda: _position(streams),
            on_progress=on_progress,
        )
        fit(
            engine,
            _objective(spec, store, engine.device),
            feed,
            state,
            num_steps=spec.steps,
            checkpoints=checkpoints,
            record=record,
        )
        whole = whole.to(engine.device)
        last_step = _scores(spec, whole, engine, rank, world_size, averaged=False)
        scores = last_step
        if spec.ema_decay is not None:
            scores = _scores(spec, whole, engine, rank, world_size, averaged=True)
        starved = feed.seconds_starved
    ended = time.time()
    result = StageResult(
        name=spec.name,
        fingerprint=spec.fingerprint,
        world_size=world_size,
        started=started,
        first_step_at=record.first_step_at,
        ended=ended,
        seconds=ended - started + seconds_before,
        steps=spec.steps,
        samples=spec.steps * (spec.batch_size + spec.unlabelled_batch_size),
        seconds_starved=starved,
        seconds_saving=checkpoints.seconds_blocked,
        final_loss=record.last_loss,
        predictions=scores[0],
        correct=scores[1],
        last_step_correct=last_step[1] if spec.ema_decay is not None else (),
    )
    if rank == 0:
        if attempt is not None:
            attempt.check()
        for name, data in model_files(whole.cpu()).items():
            store.write(f"{layout.stage_model_prefix(spec.name)}/{name}", data)
        store.write(layout.result_key(spec.name), result.model_dump_json().encode())
    dist.barrier()
    checkpoints.clear()
    return result


@contextmanager
def _engine(spec: StageSpec, module: nn.Module, world_size: int) -> Iterator[Engine]:
    engine = Engine(
        module,
        spec.engine,
        spec.optimizer,
        batch_per_rank=spec.batch_size // world_size,
        num_steps=spec.steps,
        ema_decay=spec.ema_decay,
    )
    try:
        yield engine
    finally:
        engine.close()


def _checkpoints(
    spec: StageSpec, store: ObjectStore, rank: int, world_size: int, attempt: Attempt | None
) -> Checkpoints:
    return Checkpoints(
        store,
        spec.name,
        spec.checkpoints,
        fingerprint=spec.fingerprint,
        rank=rank,
        world_size=world_size,
        attempt=attempt,
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


def _position(streams: list[ShardStream]) -> int | None:
    return streams[0].position if streams else None


def _objective(spec: StageSpec, store: ObjectStore, device: torch.device) -> objectives.Objective:
    match spec.objective:
        case objectives.SupervisedSpec():
            return objectives.supervised
        case objectives.PSSLSpec(p_ssl=config):
            return objectives.PSSL(config, spec.steps)
        case objectives.DistillationSpec(distillation=config, teacher=place):
            teacher = _teacher(spec, store, place, config.temperature)
            return objectives.Distillation(config, teacher.to(device))
        case objectives.HubSpec(loss=config):
            hub = spec.model.hub if isinstance(spec.model, CachedHub) else spec.model
            assert isinstance(hub, NewHub), "held by the specification"
            return objectives.Hub(config, spec.seed, len(hub.experts))
        case objectives.ReadoutSpec():
            return objectives.ReadoutFit(spec.objective)
        case objectives.DiffusionSpec():
            return objectives.Diffusion(spec.seed)


def _teacher(
    spec: StageSpec, store: ObjectStore, place: str | tuple[str, ...], temperature: float
) -> nn.Module:
    if isinstance(place, str):
        return load_classifier(store, place, image_shape=spec.image_shape)
    teachers = [load_classifier(store, one, image_shape=spec.image_shape) for one in place]
    return MeanTeacher(teachers, temperature)


def _metrics(spec: StageSpec, store: ObjectStore, earlier: bytes, resume_step: int) -> MetricsLog:
    key = layout.metrics_key(spec.name)
    return MetricsLog(
        lambda data: store.write(key, data), existing=earlier, resume_step=resume_step
    )


def _seconds_until(metrics: bytes, step: int) -> float:
    """Seconds that earlier attempts spent on the steps that this attempt does not repeat."""
    return max((row["elapsed_s"] for row in read_rows(metrics) if row["step"] <= step), default=0.0)


def _scores(
    spec: StageSpec,
    whole: nn.Module,
    engine: Engine,
    rank: int,
    world_size: int,
    *,
    averaged: bool,
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Predictions and whether they are right; each rank predicts its share of the rows."""
    load_weights(whole, engine.full_weights(averaged=averaged))
    if spec.evaluate is None:
        return (), ()
    data = load_rows(spec.evaluate)
    share = np.array_split(np.arange(len(data)), world_size)[rank]
    gathered: list[list[int]] = [[] for _ in range(world_size)]
    dist.all_gather_object(gathered, _predict(whole, data.images[share], engine.device))
    predictions = tuple(prediction for part in gathered for prediction in part)
    pairs = zip(predictions, data.labels.tolist(), strict=True)
    return predictions, tuple(prediction == label for prediction, label in pairs)


@torch.no_grad()
def _predict(network: nn.Module, images: np.ndarray, device: torch.device) -> list[int]:
    starts = range(0, len(images), EVALUATION_BATCH)
    batches = (to_float(images[i : i + EVALUATION_BATCH]).to(device) for i in starts)
    return [int(c) for batch in batches for c in network(batch).argmax(dim=1).cpu()]
