"""The generator pool: Ray actors that generate and commit shards of pseudo samples.

The pool keeps every actor busy, stays within a window ahead of the slowest reader, and scales
between its bounds on the backlog. The content of a shard depends only on its order, so scaling
does not affect the trainers.
"""

import logging
import os
import threading
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from dist_tl.cluster.config import Bounds, GeneratorsConfig
from dist_tl.cluster.metrics import GeneratorMetrics, RestartMetrics
from dist_tl.cluster.pending import PendingActors
from dist_tl.cluster.roles import actor_options, start_actor
from dist_tl.cluster.scaling import read_scale
from dist_tl.errors import ConfigError, DamagedError, DistTLError, StorageError, WorkerError
from dist_tl.shards.drawing import (
    GenerateSpec,
    draw_samples,
    open_generator,
    read_conditions,
)
from dist_tl.shards.manifest import ShardEntry, committed_indices, read_entry
from dist_tl.shards.order import DataOrder
from dist_tl.shards.writer import write_shard
from dist_tl.storage.objects import ObjectStore

logger = logging.getLogger(__name__)
POLL_S = 0.1
OVERRIDE_POLL_S = 2.0
DRAINING = "DIST_TL_DRAINING"  # environment variable: a file that exists while the pod drains
NEW, PROBED = "new", "probed"  # kinds of pending workers: started, or checked for a response
MAX_PAUSE_S = 60.0
IDLE_S = 10.0  # about the time to start a worker


class GeneratorActor:
    """One generator on one device. Generation is deterministic, so retries are safe."""

    def __init__(self, store_url: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = True
        self._store = ObjectStore(store_url)
        self._spec: GenerateSpec | None = None

    def open(self) -> None:
        """Does nothing: the generator is loaded with the first shard of each stage."""

    def is_draining(self) -> bool:
        """Whether this node is draining: the pod's preStop hook creates a file."""
        marker = os.environ.get(DRAINING)
        return bool(marker) and os.path.exists(marker)

    def fulfil(self, spec: GenerateSpec, index: int) -> ShardEntry | None:
        """Generates and commits one shard; returns None without a shard if the node is draining."""
        if self.is_draining():
            return None
        if self._spec is None or self._spec.generator != spec.generator:
            self._generator = open_generator(self._store, spec.generator)
        if self._spec != spec:
            self._conditions = read_conditions(self._store, spec)
            self._spec = spec
        order = spec.plan().order(index)
        samples = draw_samples(order, spec, self._generator, self._conditions)
        return write_shard(order, samples, self._store)


@dataclass
class StageProgress:
    """Progress of one generate stage. Times are Unix seconds.

    Attributes:
        todo: shards that are not assigned to a worker yet, in order.
        first_missing: the lowest shard that was not committed when the stage was added.
        window: maximum number of shards ahead of the slowest reader.
    """

    spec: GenerateSpec
    todo: list[int]
    num_shards: int
    first_missing: int
    window: int
    committed: int = 0
    bytes: int = 0
    worker_seconds: float = 0.0
    first_commit_at: float | None = None
    last_commit_at: float | None = None
    first_order_at: float | None = None
    started: float = field(default_factory=time.time)

    @property
    def done(self) -> bool:
        """Whether every shard is committed."""
        return self.committed == self.num_shards

    def count(self, entry: ShardEntry) -> None:
        """Adds a committed shard to the counters."""
        at = entry.committed_at
        self.committed += 1
        self.bytes += entry.bytes
        self.worker_seconds += entry.seconds
        self.first_commit_at = min(at, self.first_commit_at or at)
        self.last_commit_at = max(at, self.last_commit_at or at)


class GeneratorPool:
    """Context manager of the workers; generates added stages in the background, in order.

    Args:
        positions: returns the lowest shard that each stage's readers still need, by stage name.
        roles: whether the cluster's nodes have roles.
    """

    def __init__(
        self,
        config: GeneratorsConfig,
        store_url: str,
        *,
        positions: Callable[[], dict[str, int]],
        roles: bool = False,
    ) -> None:
        self._roles = roles
        self._config, self._store_url, self._positions = config, store_url, positions
        self._store = ObjectStore(store_url)
        self._bounds: Bounds = config
        self._override_read_at = float("-inf")
        self._metrics = GeneratorMetrics(store_url)
        self._is_throttled = True
        self._stages: list[StageProgress] = []
        self._pending: PendingActors[str] = PendingActors()
        self._failed_starts, self._start_after = 0, 0.0
        self._losses: Counter[tuple[str, int]] = Counter()  # lost workers by stage and shard
        self._restarts = RestartMetrics(store_url, "generators")
        # With the monotonic time since which a worker is idle; the latest is last.
        self._idle: list[tuple[ActorHandle, float]] = []
        self._running: dict[ray.ObjectRef, tuple[ActorHandle, StageProgress, int]] = {}
        self._failure: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="generator pool")

    def __enter__(self) -> "GeneratorPool":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Always join: a thread that calls Ray during ray.shutdown crashes the driver.
        self._stopped.set()
        self._thread.join(timeout=10)
        if kind is not None:  # the session stops all actors
            return
        workers = [actor for actor, *_ in [*self._idle, *self._running.values()]]
        for actor in [*self._pending.actors, *workers]:
            ray.kill(actor)

    def add(self, spec: GenerateSpec, *, batch_size: int) -> StageProgress:
        """Queues a stage with a stored manifest; committed shards are not generated again.

        Args:
            batch_size: the largest global batch of the readers. The window is at least twice the
                reach of a batch, or readers and generators could deadlock.
        """
        plan = spec.plan()
        committed = committed_indices(self._store, spec.name)
        todo = [i for i in range(plan.num_shards) if i not in committed]
        first_missing = todo[0] if todo else plan.num_shards
        window = max(self._config.window, 2 * DataOrder(plan).reach(batch_size))
        progress = StageProgress(spec, todo, plan.num_shards, first_missing, window)
        for index in sorted(committed):
            entry = read_entry(self._store, spec.name, index)
            if entry is not None:
                progress.count(entry)
        self._stages.append(progress)
        return progress

    def scale(self, low: int, high: int) -> None:
        """Changes the bounds of the running pool."""
        self._bounds = Bounds(min=low, max=high)

    def release(self) -> None:
        """Stops throttling: generates the remaining shards without waiting for readers."""
        self._is_throttled = False

    @property
    def num_workers(self) -> int:
        """Number of running and pending workers."""
        return len(self._pending) + len(self._idle) + len(self._running)

    def wait(self, seconds: float) -> None:
        """Waits, at most until the pool stops."""
        self._stopped.wait(seconds)

    def check(self) -> None:
        """Raises the error that stopped the pool, if any.

        Raises:
            DistTLError: the named error that a worker raised.
            WorkerError: a worker died more often than it may be restarted.
        """
        if self._failure is None:
            return
        # Ray wraps a worker's error in a class that only imitates it.
        cause = getattr(self._failure, "cause", None) or self._failure
        if isinstance(cause, DistTLError):
            raise cause
        raise WorkerError(
            f"a generator worker was lost for good: {self._failure}; start the same job again to "
            "resume from the committed shards"
        )

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._apply_override()
                positions = self._positions()
                self._report_metrics(positions)
                self._admit_ready()
                self._resize(positions)
                self._assign(positions)
                self._collect()
        except Exception as error:
            self._failure = error

    def _apply_override(self) -> None:
        """Applies the scaling override of the run's store, every few seconds."""
        now = time.monotonic()
        if now - self._override_read_at < OVERRIDE_POLL_S:
            return
        self._override_read_at = now
        if self._roles:
            self._kill_draining()
        try:
            scale = read_scale(self._store)
        except (StorageError, ConfigError, DamagedError) as error:
            logger.warning("the pool keeps its bounds: %s", error)
            return
        if scale is not None:
            self._bounds = scale.generators

    def _report_metrics(self, positions: dict[str, int]) -> None:
        self._metrics.workers(self.num_workers)
        for stage in self._stages:
            behind = stage.committed - positions.get(stage.spec.name, 0)
            self._metrics.backlog(stage.spec.name, max(0, behind))

    def _kill_draining(self) -> None:
        """Kills idle workers on nodes that are draining."""
        replies: dict[ray.ObjectRef, tuple[ActorHandle, float]] = {
            actor.is_draining.remote(): (actor, since) for actor, since in self._idle
        }
        ready: list[ray.ObjectRef] = []
        if replies:
            ready, _ = ray.wait(list(replies), num_returns=len(replies), timeout=1)
        for ref in ready:
            if _is_draining(ref):
                self._idle.remove(replies[ref])
                ray.kill(replies[ref][0])

    def _resize(self, positions: dict[str, int]) -> None:
        low, high = self._bounds.min, self._bounds.max
        wanted = 0
        if any(not stage.done for stage in self._stages):
            wanted = min(high, max(1, high if self._backlog_is_low(positions) else low))
        while self.num_workers < wanted and time.monotonic() >= self._start_after:
            self._pending.add(NEW, self._new_worker())
        while self.num_workers > wanted and self._pending.count(NEW):
            self._pending.cancel_latest(NEW)
        # Only idle workers are killed, so no shard is interrupted.
        while self._idle and self._has_excess(wanted, high):
            ray.kill(self._idle.pop(0)[0])

    def _admit_ready(self) -> None:
        """Adds ready workers to the idle ones."""
        failure = None
        for key, actor, error in self._pending.poll():
            if error is None:
                self._idle.append((actor, time.monotonic()))
                self._failed_starts = 0 if key == NEW else self._failed_starts
            elif key == NEW:
                failure = error
        if failure is not None:
            self._back_off(failure)

    def _back_off(self, error: RayError) -> None:
        """Delays the next worker after one died during start-up; each time longer."""
        self._failed_starts += 1
        if self._failed_starts > self._config.max_restarts and not self.num_workers:
            raise error
        pause_s = min(MAX_PAUSE_S, 2.0 ** min(self._failed_starts, 6))
        self._start_after = time.monotonic() + pause_s
        self._restarts.count()
        logger.warning("a new generator worker died; the next in %g s: %s", pause_s, error)

    def _handle_loss(
        self, actor: ActorHandle, stage: StageProgress, index: int, error: RayError
    ) -> None:
        """Kills a worker that does not respond, and puts its shard back into `todo`."""
        ray.kill(actor)
        insort(stage.todo, index)
        self._losses[stage.spec.name, index] += 1
        if self._losses[stage.spec.name, index] > self._config.max_restarts:
            raise error
        self._restarts.count()
        logger.warning("shard %d of %s lost its worker: %s", index, stage.spec.name, error)
        # Idle workers may be lost with the same node: none gets a shard before it responds again.
        while self._idle:
            self._pending.add(PROBED, self._idle.pop()[0])

    def _has_excess(self, wanted: int, high: int) -> bool:
        if wanted == 0 or self.num_workers > high:
            return True
        idle_since = self._idle[0][1]
        return self.num_workers > wanted and time.monotonic() - idle_since > IDLE_S

    def _backlog_is_low(self, positions: dict[str, int]) -> bool:
        return any(
            stage.committed - positions.get(stage.spec.name, 0) < self._config.low_backlog
            for stage in self._stages
            if not stage.done
        )

    def _new_worker(self) -> ActorHandle:
        config = self._config
        options = actor_options(
            "generators", enabled=self._roles, cpus=config.cpus, gpus=config.gpus
        )
        # The pool replaces lost workers: Ray would spend its retries on a node that is gone before
        # it notices the loss.
        options |= {"max_restarts": 0, "max_task_retries": 0}
        return start_actor(GeneratorActor, options, self._store_url, config.threads)

    def _assign(self, positions: dict[str, int]) -> None:
        while self._idle and (next_shard := self._next_shard(positions)) is not None:
            stage, index = next_shard
            stage.first_order_at = stage.first_order_at or time.time()
            actor, _ = self._idle.pop()
            self._running[actor.fulfil.remote(stage.spec, index)] = (actor, stage, index)

    def _next_shard(self, positions: dict[str, int]) -> tuple[StageProgress, int] | None:
        for stage in self._stages:
            if stage.todo and stage.todo[0] < self._horizon(stage, positions):
                return stage, stage.todo.pop(0)
        return None

    def _horizon(self, stage: StageProgress, positions: dict[str, int]) -> int:
        """Returns the first shard that has to wait for the readers."""
        if not self._is_throttled:
            return stage.num_shards
        # A restarted reader reports its position only after its first batch, which may need a shard
        # that does not exist yet.
        return positions.get(stage.spec.name, stage.first_missing) + stage.window

    def _collect(self) -> None:
        if not self._running:
            time.sleep(POLL_S)
            return
        finished, _ = ray.wait(list(self._running), timeout=POLL_S)
        for ref in finished:
            actor, stage, index = self._running.pop(ref)
            try:
                entry = ray.get(ref)
            except RayTaskError:
                raise
            except RayError as error:  # the worker was lost
                self._handle_loss(actor, stage, index, error)
                continue
            if entry is None:
                insort(stage.todo, index)
                ray.kill(actor)
                continue
            self._idle.append((actor, time.monotonic()))
            stage.count(entry)
            self._metrics.committed(stage.spec.name, entry.samples)


def _is_draining(ref: ray.ObjectRef) -> bool:
    try:
        return ray.get(ref)
    except RayError:
        return True
