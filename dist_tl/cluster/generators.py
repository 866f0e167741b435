"""The generator pool: Ray actors that turn shard orders into committed shards.

The pool keeps every actor busy, never runs further ahead of the slowest reader than its window,
and grows and shrinks between its bounds on backlog. Trainers never notice: what a shard holds
follows from its order alone.
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

from dist_tl.cluster.config import GeneratorsConfig
from dist_tl.cluster.metrics import GeneratorMetrics, RestartMetrics
from dist_tl.cluster.pending import PendingActors
from dist_tl.cluster.roles import actor_options
from dist_tl.cluster.scaling import read_scale
from dist_tl.errors import ConfigError, DistTLError, StorageError, WorkerError
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
ASK_EVERY_S = 2.0
DRAINING = "DIST_TL_DRAINING"  # names a file that exists once the worker's pod is to end
NEW, AGAIN = "new", "again"  # workers on their way; those that were lost sight of
MAX_PAUSE_S = 60.0
IDLE_S = 10.0  # starting a worker anew costs about as long


class GeneratorActor:
    """One generator on one device. A retry is harmless: it makes the same bytes."""

    def __init__(self, store_url: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = True
        self._store = ObjectStore(store_url)
        self._spec: GenerateSpec | None = None

    def open(self) -> None:
        """Answer: what it works with is loaded with the first shard, and may change with each."""

    def is_leaving(self) -> bool:
        """Whether this node is being drained: the pod's preStop hook leaves a file behind."""
        sign = os.environ.get(DRAINING)
        return bool(sign) and os.path.exists(sign)

    def fulfil(self, spec: GenerateSpec, index: int) -> ShardEntry | None:
        """Make and commit one shard of a stage; None, the order handed back, where it leaves."""
        if self.is_leaving():
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
    """How far one stage of pseudo samples is. Times are Unix seconds.

    Attributes:
        todo: shards that nobody has been asked for yet, in order.
        first_missing: the lowest shard that did not exist when the stage was added.
        window: shards made ahead of the slowest reader at most.
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
        self._bounds = (config.min, config.max)
        self._asked_at = float("-inf")
        self._metrics = GeneratorMetrics(store_url)
        self._is_held_back = True
        self._stages: list[StageProgress] = []
        self._arrivals: PendingActors[str] = PendingActors()
        self._lost_on_the_way, self._start_after = 0, 0.0
        self._losses: Counter[tuple[str, int]] = Counter()  # of workers, by stage and shard
        self._restarts = RestartMetrics(store_url, "generators")
        self._idle: list[tuple[ActorHandle, float]] = []  # and since when; the latest is last
        self._running: dict[ray.ObjectRef, tuple[ActorHandle, StageProgress, int]] = {}
        self._failure: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True, name="generator pool")

    def __enter__(self) -> "GeneratorPool":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Joined in any case: a thread that calls Ray while the driver leaves it crashes both.
        self._stopped.set()
        self._thread.join(timeout=10)
        if kind is not None:  # the session ends the workers with everything else
            return
        at_work = [actor for actor, *_ in [*self._idle, *self._running.values()]]
        for actor in [*self._arrivals.actors, *at_work]:
            ray.kill(actor)

    def add(self, spec: GenerateSpec, *, batch_size: int) -> StageProgress:
        """Queue a stage whose manifest is stored; shards that exist already are not made again.

        Args:
            batch_size: the largest global batch that readers take; a window smaller than what one
                such batch touches would have readers and generators wait for each other.
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
        """Change the bounds of the pool while it works."""
        self._bounds = (low, high)

    def release(self) -> None:
        """Make all that is left without regard to readers: none of them is still at work."""
        self._is_held_back = False

    @property
    def num_workers(self) -> int:
        """Workers alive now, or about to be."""
        return len(self._arrivals) + len(self._idle) + len(self._running)

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
        # Ray's wrapper of a worker's error only looks like the error itself.
        cause = getattr(self._failure, "cause", None) or self._failure
        if isinstance(cause, DistTLError):
            raise cause
        raise WorkerError(
            f"a generator worker was lost for good: {self._failure}; start the same job again to "
            "go on from the shards that are committed"
        )

    def _serve(self) -> None:
        try:
            while not self._stopped.is_set():
                self._obey()
                positions = self._positions()
                self._tell(positions)
                self._welcome()
                self._resize(positions)
                self._issue(positions)
                self._collect()
        except Exception as error:
            self._failure = error

    def _obey(self) -> None:
        """Take over the bounds that were asked for from outside, once in a while."""
        now = time.monotonic()
        if now - self._asked_at < ASK_EVERY_S:
            return
        self._asked_at = now
        if self._roles:
            self._let_go()
        try:
            scale = read_scale(self._store)
        except (StorageError, ConfigError) as error:
            logger.warning("the pool keeps its size: %s", error)  # what was said last still holds
            return
        if scale is not None:
            self._bounds = (scale.generators.min, scale.generators.max)

    def _tell(self, positions: dict[str, int]) -> None:
        self._metrics.workers(self.num_workers)
        for stage in self._stages:
            behind = stage.committed - positions.get(stage.spec.name, 0)
            self._metrics.backlog(stage.spec.name, max(0, behind))

    def _let_go(self) -> None:
        """End idle workers whose nodes are about to go."""
        replies = {actor.is_leaving.remote(): (actor, since) for actor, since in self._idle}
        ready: list[ray.ObjectRef] = []
        if replies:
            ready, _ = ray.wait(list(replies), num_returns=len(replies), timeout=1)
        for ticket in ready:
            if _is_leaving(ticket):
                self._idle.remove(replies[ticket])
                ray.kill(replies[ticket][0])

    def _resize(self, positions: dict[str, int]) -> None:
        low, high = self._bounds
        wanted = 0
        if any(not stage.done for stage in self._stages):
            wanted = min(high, max(1, high if self._backlog_is_low(positions) else low))
        while self.num_workers < wanted and time.monotonic() >= self._start_after:
            self._arrivals.add(NEW, self._new_worker())
        while self.num_workers > wanted and self._arrivals.count(NEW):
            self._arrivals.drop(NEW)
        # Shrinking waits for idle workers, so no order is ever taken away from one.
        while self._idle and self._is_too_many(wanted, high):
            ray.kill(self._idle.pop(0)[0])

    def _welcome(self) -> None:
        """Workers that have found their place may be asked for shards."""
        lost = None
        for key, actor, error in self._arrivals.poll():
            if error is None:
                self._idle.append((actor, time.monotonic()))
                self._lost_on_the_way = 0 if key == NEW else self._lost_on_the_way
            elif key == NEW:
                lost = error
        if lost is not None:
            self._hold_back(lost)

    def _hold_back(self, error: RayError) -> None:
        """A new worker died before it was of use: wait longer each time before the next."""
        self._lost_on_the_way += 1
        if self._lost_on_the_way > self._config.max_restarts and not self.num_workers:
            raise error
        pause_s = min(MAX_PAUSE_S, 2.0 ** min(self._lost_on_the_way, 6))
        self._start_after = time.monotonic() + pause_s
        self._restarts.count()
        logger.warning("a new generator worker died; the next in %g s: %s", pause_s, error)

    def _lose(self, actor: ActorHandle, stage: StageProgress, index: int, error: RayError) -> None:
        """Give a worker up that does not answer; its shard goes to another."""
        ray.kill(actor)
        insort(stage.todo, index)
        self._losses[stage.spec.name, index] += 1
        if self._losses[stage.spec.name, index] > self._config.max_restarts:
            raise error
        self._restarts.count()
        logger.warning("shard %d of %s lost its worker: %s", index, stage.spec.name, error)
        # Others may have gone with the same node: none is asked for a shard before it answers.
        while self._idle:
            self._arrivals.add(AGAIN, self._idle.pop()[0])

    def _is_too_many(self, wanted: int, high: int) -> bool:
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
        actor = ray.remote(GeneratorActor).options(
            **options,
            # The pool replaces a lost worker itself: Ray's own retries are used up while it still
            # believes in a node that is gone.
            max_restarts=0,
            max_task_retries=0,
        )
        return actor.remote(self._store_url, self._config.threads)

    def _issue(self, positions: dict[str, int]) -> None:
        while self._idle and (found := self._next_order(positions)) is not None:
            stage, index = found
            stage.first_order_at = stage.first_order_at or time.time()
            actor, _ = self._idle.pop()
            self._running[actor.fulfil.remote(stage.spec, index)] = (actor, stage, index)

    def _next_order(self, positions: dict[str, int]) -> tuple[StageProgress, int] | None:
        for stage in self._stages:
            if stage.todo and stage.todo[0] < self._horizon(stage, positions):
                return stage, stage.todo.pop(0)
        return None

    def _horizon(self, stage: StageProgress, positions: dict[str, int]) -> int:
        """The shard at which the stage has to wait for its readers."""
        if not self._is_held_back:
            return stage.num_shards
        # A reader that was restarted says where it is after its first batch, and may need a shard
        # for that which does not exist yet.
        return positions.get(stage.spec.name, stage.first_missing) + stage.window

    def _collect(self) -> None:
        if not self._running:
            time.sleep(POLL_S)
            return
        finished, _ = ray.wait(list(self._running), timeout=POLL_S)
        for ticket in finished:
            actor, stage, index = self._running.pop(ticket)
            try:
                entry = ray.get(ticket)
            except RayTaskError:
                raise
            except RayError as error:  # the worker, not the work
                self._lose(actor, stage, index, error)
                continue
            if entry is None:
                insort(stage.todo, index)
                ray.kill(actor)
                continue
            self._idle.append((actor, time.monotonic()))
            stage.count(entry)
            self._metrics.committed(stage.spec.name, entry.samples)


def _is_leaving(ticket: ray.ObjectRef) -> bool:
    try:
        return ray.get(ticket)
    except RayError:
        return True
