"""The generator pool: Ray actors that turn shard orders into committed shards.

The pool keeps every actor busy, never runs further ahead of the slowest reader than its window,
and grows and shrinks between its bounds on backlog. Trainers never notice: what a shard holds
follows from its order alone.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import ray
import torch
from ray.actor import ActorHandle

from dist_tl.cluster.config import GeneratorsConfig
from dist_tl.errors import DistTLError, WorkerError
from dist_tl.shards.drawing import (
    GenerateSpec,
    draw_samples,
    open_generator,
    read_conditions,
)
from dist_tl.shards.manifest import ShardEntry, committed_indices, read_entry
from dist_tl.shards.writer import write_shard
from dist_tl.storage.objects import ObjectStore

POLL_S = 0.1


class GeneratorActor:
    """One generator on one device. A retry is harmless: it makes the same bytes."""

    def __init__(self, store_url: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = True
        self._store = ObjectStore(store_url)
        self._spec: GenerateSpec | None = None

    def fulfil(self, spec: GenerateSpec, index: int) -> ShardEntry:
        """Make and commit one shard of a stage."""
        if self._spec is None or self._spec.generator != spec.generator:
            self._generator = open_generator(self._store, spec)
        if self._spec != spec:
            self._conditions = read_conditions(self._store, spec)
            self._spec = spec
        order = spec.plan().order(index)
        samples = draw_samples(order, spec, self._generator, self._conditions)
        return write_shard(order, samples, self._store)


@dataclass
class StageProgress:
    """How far one stage of pseudo samples is. Times are Unix seconds."""

    spec: GenerateSpec
    todo: list[int]
    num_shards: int
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
        """Take a committed shard into the figures."""
        at = entry.committed_at
        self.committed += 1
        self.bytes += entry.bytes
        self.worker_seconds += entry.seconds
        self.first_commit_at = min(at, self.first_commit_at or at)
        self.last_commit_at = max(at, self.last_commit_at or at)


class GeneratorPool:
    """Use as a context manager; stages that are added are made in the background, in order.

    Args:
        positions: the lowest shard that each stage's readers still need, by stage name.
    """

    def __init__(
        self,
        config: GeneratorsConfig,
        store_url: str,
        *,
        positions: Callable[[], dict[str, int]],
    ) -> None:
        self._config, self._store_url, self._positions = config, store_url, positions
        self._store = ObjectStore(store_url)
        self._bounds = (config.min, config.max)
        self._stages: list[StageProgress] = []
        self._idle: list[ActorHandle] = []
        self._running: dict[ray.ObjectRef, tuple[ActorHandle, StageProgress]] = {}
        self._failure: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True, name="generator pool")

    def __enter__(self) -> "GeneratorPool":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stopped.set()
        if kind is not None:  # the session ends the workers with everything else
            return
        self._thread.join(timeout=10)
        for actor in [*self._idle, *(actor for actor, _ in self._running.values())]:
            ray.kill(actor)

    def add(self, spec: GenerateSpec) -> StageProgress:
        """Queue a stage whose manifest is stored; shards that exist already are not made again."""
        plan = spec.plan()
        committed = committed_indices(self._store, spec.name)
        todo = [i for i in range(plan.num_shards) if i not in committed]
        progress = StageProgress(spec, todo, plan.num_shards)
        for index in sorted(committed):
            entry = read_entry(self._store, spec.name, index)
            if entry is not None:
                progress.count(entry)
        self._stages.append(progress)
        return progress

    def scale(self, low: int, high: int) -> None:
        """Change the bounds of the pool while it works."""
        self._bounds = (low, high)

    @property
    def num_workers(self) -> int:
        """Workers alive now."""
        return len(self._idle) + len(self._running)

    def wait(self, seconds: float) -> None:
        """Pause, less if the pool stops meanwhile."""
        self._stopped.wait(seconds)

    def check(self) -> None:
        """Raise what ended the pool, if anything did.

        Raises:
            DistTLError: the named error that a worker met.
            WorkerError: a worker died more often than it may be restarted.
        """
        if self._failure is None:
            return
        cause = getattr(self._failure, "cause", None)
        if isinstance(cause, DistTLError):
            raise cause
        raise WorkerError(
            f"a generator worker was lost for good: {self._failure}; start the same job again to "
            "go on from the shards that are committed"
        )

    def _serve(self) -> None:
        try:
            while not self._stopped.is_set():
                self._resize()
                self._issue()
                self._collect()
        except Exception as error:
            self._failure = error

    def _resize(self) -> None:
        low, high = self._bounds
        has_work = any(not stage.done for stage in self._stages)
        wanted = 0 if not has_work else high if self._backlog_is_low() else low
        while self.num_workers < min(max(wanted, 1 if has_work else 0), high):
            self._idle.append(self._new_worker())
        # Shrinking waits for idle workers, so no order is ever taken away from one.
        while self._idle and (self.num_workers > high or not has_work):
            ray.kill(self._idle.pop())

    def _backlog_is_low(self) -> bool:
        positions = self._positions()
        return any(
            stage.committed - positions.get(stage.spec.name, 0) < self._config.low_backlog
            for stage in self._stages
            if not stage.done
        )

    def _new_worker(self) -> ActorHandle:
        actor = ray.remote(GeneratorActor).options(
            num_cpus=self._config.cpus,
            num_gpus=self._config.gpus,
            max_restarts=self._config.max_restarts,
            max_task_retries=self._config.max_restarts,
        )
        return actor.remote(self._store_url, self._config.threads)

    def _issue(self) -> None:
        positions = self._positions()
        while self._idle and (found := self._next_order(positions)) is not None:
            stage, index = found
            stage.first_order_at = stage.first_order_at or time.time()
            actor = self._idle.pop()
            self._running[actor.fulfil.remote(stage.spec, index)] = (actor, stage)

    def _next_order(self, positions: dict[str, int]) -> tuple[StageProgress, int] | None:
        for stage in self._stages:
            horizon = positions.get(stage.spec.name, 0) + self._config.window
            if stage.todo and stage.todo[0] < horizon:
                return stage, stage.todo.pop(0)
        return None

    def _collect(self) -> None:
        if not self._running:
            time.sleep(POLL_S)
            return
        finished, _ = ray.wait(list(self._running), timeout=POLL_S)
        for ticket in finished:
            actor, stage = self._running.pop(ticket)
            self._idle.append(actor)
            stage.count(ray.get(ticket))
