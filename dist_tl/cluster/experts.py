"""The expert pool: routers and experts as Ray actors, which answer a data set shard by shard.

A router reads a shard, sends each expert the samples that chose it and nothing else, puts the
answers in their places and commits the predictions as a shard. Experts have replicas, and get more
of them the more samples come. Whatever dies is restarted, and its batch run again; what was
committed is never made twice.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import ray
import torch
from ray.actor import ActorHandle

from dist_tl.cluster.config import ExpertsConfig
from dist_tl.cluster.inputs import RowsInput, StageInput
from dist_tl.cluster.outcomes import collect
from dist_tl.cluster.roles import actor_options
from dist_tl.cluster.routers import AnswerSettings, RouterActor, ShardAnswer
from dist_tl.errors import WorkerError, WorkerLost
from dist_tl.shards.manifest import committed_indices
from dist_tl.shards.order import ShardPlan
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.hub_model import load_expert

POLL_S = 0.2
LOAD_MEMORY = 0.7  # share of the past in the moving average of an expert's load


class ExpertActor:
    """One expert on one device."""

    def __init__(self, store_url: str, place: str, name: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = True
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._expert = load_expert(ObjectStore(store_url), place, name).to(self._device)

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (S, C), float32 on the CPU, of images (S, C, H, W) in [-1, 1]."""
        return self._expert(images.to(self._device)).float().cpu()


@dataclass
class Replicas:
    """The actors of one expert.

    Attributes:
        starting: those that may still wait for a place on the cluster; they get no samples yet.
        load: moving average of its share of all (sample, expert) pairs.
        pairs: samples it was sent in all.
        most: actors at most at one time.
    """

    name: str
    actors: list[ActorHandle] = field(default_factory=list)
    starting: dict[ray.ObjectRef, ActorHandle] = field(default_factory=dict)
    load: float = 0.0
    pairs: int = 0
    most: int = 0


class ExpertPool:
    """Use as a context manager; :meth:`answer` returns when every shard is committed.

    Args:
        place: where the stored hub is: a key of the run, or a URL.
        experts: their names, in the order of the hub.
        degrade: leave an expert out that stays away, instead of giving up.
        roles: whether the cluster's nodes have roles.
        attempt: the start of the run; nothing is committed after a later one. 0 does not look.
    """

    def __init__(
        self,
        config: ExpertsConfig,
        store: ObjectStore,
        place: str,
        experts: Sequence[str],
        *,
        degrade: bool,
        roles: bool = False,
        attempt: int = 0,
    ) -> None:
        self._config, self._store, self._place = config, store, place
        self._degrade, self._roles, self._attempt = degrade, roles, attempt
        self.replicas = [Replicas(name) for name in experts]
        self.lost: frozenset[int] = frozenset()
        self._routers: list[ActorHandle] = []
        self._running: dict[ray.ObjectRef, tuple[ActorHandle, int]] = {}
        # Replicas that get no more orders, each with the orders that still know of it.
        self._retired: list[tuple[ActorHandle, set[ray.ObjectRef]]] = []

    def __enter__(self) -> "ExpertPool":
        for replicas in self.replicas:
            self._resize(replicas, self._config.min)
        self._routers = [self._new_router() for _ in range(self._config.routers)]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # the session ends the actors with everything else
            return
        actors = [a for r in self.replicas for a in (*r.actors, *r.starting.values())]
        for actor in [*self._routers, *actors, *(actor for actor, _ in self._retired)]:
            ray.kill(actor)

    def answer(
        self,
        source: StageInput | RowsInput,
        plan: ShardPlan,
        *,
        on_poll: Callable[[], None] = lambda: None,
        on_done: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Answer every shard that has no predictions yet; as many at a time as there are routers.

        Args:
            plan: of the predictions.
            on_done: told shards committed, and shards in all.

        Raises:
            WorkerError: an expert stayed away and none may be left out, or too few are left.
            DistTLError: the named error that an actor met.
        """
        committed = committed_indices(self._store, plan.stage)
        todo = [i for i in range(plan.num_shards) if i not in committed]
        if todo:
            self.wait_until_up(on_poll)
        done, idle = plan.num_shards - len(todo), list(self._routers)
        losses: Counter[int] = Counter()
        while todo or self._running:
            while todo and idle:
                router, index = idle.pop(), todo.pop(0)
                self._running[self._order(router, source, plan, index)] = (router, index)
            ready, _ = ray.wait(list(self._running), timeout=POLL_S)
            on_poll()
            for ticket in ready:
                router, index = self._running.pop(ticket)
                try:
                    found = collect(ticket, f"the router of shard {index}")
                except WorkerLost:
                    losses[index] += 1
                    if losses[index] > self._config.max_restarts:
                        raise
                    todo.insert(0, index)
                    idle.append(self._replace(router))
                    continue
                idle.append(router)
                self._take(found)
                done += 1
                on_done(done, plan.num_shards)
            if ready:
                self._welcome()
                self._follow_load()
                self._end_retired()

    def wait_until_up(self, on_poll: Callable[[], None] = lambda: None) -> None:
        """Until every expert has a replica that is up, or has taken too long; `answer` begins so.

        Raises:
            WorkerError: an expert did not come up and none may be left out.
        """
        deadline = time.monotonic() + self._config.timeout_s
        reasons: dict[int, str] = {}
        while absent := self._absent() - reasons.keys():
            on_poll()
            reasons |= self._welcome(pause_s=POLL_S)
            if time.monotonic() > deadline:
                waited = f"not up after {self._config.timeout_s:g} s; has the cluster room for it?"
                reasons |= dict.fromkeys(absent - reasons.keys(), waited)
        self._lose(reasons)

    def _order(
        self, router: ActorHandle, source: StageInput | RowsInput, plan: ShardPlan, index: int
    ) -> ray.ObjectRef:
        settings = AnswerSettings(
            batch_size=self._config.batch_size,
            timeout_s=self._config.timeout_s,
            degrade=self._degrade,
            missing=self.lost,
        )
        experts = [list(replicas.actors) for replicas in self.replicas]  # empty where lost
        return router.answer.remote(source, plan, index, experts, settings)

    def _take(self, found: ShardAnswer) -> None:
        self._lose(found.lost)
        total = sum(found.pairs)
        for replicas, pairs in zip(self.replicas, found.pairs, strict=True):
            replicas.pairs += pairs
            if total:
                share = pairs / total
                replicas.load = LOAD_MEMORY * replicas.load + (1 - LOAD_MEMORY) * share

    def _lose(self, reasons: dict[int, str]) -> None:
        """Leave experts out from now on, if that is allowed.

        Raises:
            WorkerError: it is not.
        """
        self.lost |= reasons.keys()
        if reasons and not self._degrade:
            told = "; ".join(f"{self.replicas[i].name} stayed away ({reasons[i]})" for i in reasons)
            raise WorkerError(
                f"expert {told}, after {self._config.max_restarts} restarts; start the same job "
                "again to go on from the shards that are committed, or with degrade: true to leave "
                "it out"
            )

    def _absent(self) -> frozenset[int]:
        up = (i for i, replicas in enumerate(self.replicas) if replicas.actors)
        return frozenset(range(len(self.replicas))) - self.lost - frozenset(up)

    def _welcome(self, pause_s: float = 0.0) -> dict[int, str]:
        """Replicas that are up get samples; of those that cannot start, why."""
        waiting = [ticket for replicas in self.replicas for ticket in replicas.starting]
        if not waiting:
            return {}
        ready = set(ray.wait(waiting, num_returns=len(waiting), timeout=pause_s)[0])
        reasons = {}
        for index, replicas in enumerate(self.replicas):
            for ticket in [t for t in replicas.starting if t in ready]:
                actor = replicas.starting.pop(ticket)
                try:
                    ray.get(ticket)
                    replicas.actors.append(actor)
                except ray.exceptions.RayActorError as error:
                    reasons[index] = str(error).strip().splitlines()[-1]
            replicas.most = max(replicas.most, len(replicas.actors))
        return reasons

    def _follow_load(self) -> None:
        """The busiest expert has `max` replicas, the others in proportion."""
        busiest = max(replicas.load for replicas in self.replicas)
        for index, replicas in enumerate(self.replicas):
            if index in self.lost or busiest == 0:
                continue
            wanted = round(self._config.max * replicas.load / busiest)
            self._resize(replicas, min(self._config.max, max(self._config.min, wanted)))

    def _end_retired(self) -> None:
        """End replicas that no router may still ask."""
        kept = []
        for actor, orders in self._retired:
            if orders & self._running.keys():
                kept.append((actor, orders))
            else:
                ray.kill(actor)
        self._retired = kept

    def _resize(self, replicas: Replicas, wanted: int) -> None:
        while len(replicas.actors) + len(replicas.starting) < wanted:
            actor = self._new_expert(replicas.name)
            replicas.starting[actor.__ray_ready__.remote()] = actor
        while replicas.starting and len(replicas.actors) + len(replicas.starting) > wanted:
            ray.kill(replicas.starting.popitem()[1])
        while len(replicas.actors) > wanted:
            self._retired.append((replicas.actors.pop(), set(self._running)))

    def _new_expert(self, name: str) -> ActorHandle:
        config = self._config
        options = actor_options(
            "experts",
            enabled=self._roles,
            cpus=config.cpus,
            gpus=config.gpus,
            resources=config.resources.get(name),
        )
        actor = ray.remote(ExpertActor).options(
            **options,
            scheduling_strategy="SPREAD",
            max_restarts=config.max_restarts,
            max_task_retries=config.max_restarts,
        )
        return actor.remote(self._store.url, self._place, name, config.threads)

    def _replace(self, router: ActorHandle) -> ActorHandle:
        ray.kill(router)
        self._routers[self._routers.index(router)] = fresh = self._new_router()
        return fresh

    def _new_router(self) -> ActorHandle:
        config = self._config
        options = actor_options("experts", enabled=self._roles, cpus=config.router_cpus, gpus=0.0)
        # A lost one is replaced by the pool, with its shard.
        actor = ray.remote(RouterActor).options(**options, max_restarts=0, max_task_retries=0)
        return actor.remote(self._store.url, self._place, config.threads, self._attempt)
