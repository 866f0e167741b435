"""The expert pool: routers and experts as Ray actors, which answer a data set shard by shard.

A router reads a shard, sends each expert the samples that chose it and nothing else, puts the
answers in their places and commits the predictions as a shard. Experts have replicas, and get more
of them the more samples come. Whatever dies is restarted, and its batch run again; what was
committed is never made twice.
"""

import logging
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import ray
import torch
from ray.actor import ActorHandle

from dist_tl.cluster.config import ExpertsConfig
from dist_tl.cluster.inputs import RowsInput, StageInput
from dist_tl.cluster.outcomes import collect
from dist_tl.cluster.pending import PendingActors
from dist_tl.cluster.roles import actor_options
from dist_tl.cluster.router_pool import RouterPool
from dist_tl.cluster.routers import AnswerSettings, RouterActor, ShardAnswer
from dist_tl.errors import WorkerError, WorkerLostError
from dist_tl.models.networks import Network
from dist_tl.shards.manifest import committed_indices
from dist_tl.shards.order import ShardPlan
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.hub_model import load_expert

logger = logging.getLogger(__name__)
POLL_S = 0.2
ROUTER = -1  # who is absent: an expert, by its index, or all routers
LOAD_MEMORY = 0.7  # share of the past in the moving average of an expert's load


class ExpertActor:
    """One expert on one device."""

    def __init__(self, store_url: str, place: str, name: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = True
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._source = (ObjectStore(store_url), place, name)
        self._expert: Network | None = None

    def open(self) -> None:
        """Load the expert.

        Raises:
            ConfigError: its files are missing or damaged.
        """
        self._expert = self._expert or load_expert(*self._source).to(self._device)

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (S, C), float32 on the CPU, of images (S, C, H, W) in [-1, 1]."""
        self.open()  # after a restart nobody else has
        assert self._expert is not None, "loaded just now"
        return self._expert(images.to(self._device)).float().cpu()


@dataclass
class Replicas:
    """The actors of one expert.

    Attributes:
        limit: actors at most; less than was asked for where the cluster could not start them.
        load: moving average of its share of all (sample, expert) pairs.
        pairs: samples it was sent in all.
        most: actors at most at one time.
    """

    name: str
    limit: int
    actors: list[ActorHandle] = field(default_factory=list)
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

    Attributes:
        replicas: by expert.
        arrivals: replicas that are not up yet, by expert.
        lost: experts that are left out.
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
        self.replicas = [Replicas(name, config.max) for name in experts]
        self.lost: frozenset[int] = frozenset()
        self.pending: PendingActors[int] = PendingActors()
        self._losses: Counter[int] = Counter()  # of routers, by shard
        self._running: dict[ray.ObjectRef, tuple[ActorHandle, int]] = {}
        # Replicas that get no more orders, each with the orders that still know of it.
        self._retired: list[tuple[ActorHandle, set[ray.ObjectRef]]] = []

    def __enter__(self) -> "ExpertPool":
        for index in range(len(self.replicas)):
            self._resize(index, self._config.min)
        config = self._config
        self._routers = RouterPool(
            self._new_router, config.routers, config.max_restarts, self._store.url
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # the session ends the actors with everything else
            return
        experts = [actor for replicas in self.replicas for actor in replicas.actors]
        routers = [*self._routers.actors, *(router for router, _ in self._running.values())]
        retired = [actor for actor, _ in self._retired]
        for actor in (*self.pending.actors, *experts, *routers, *retired):
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
        done = plan.num_shards - len(todo)
        if todo:
            self.wait_until_up(on_poll)
        while todo or self._running:
            if not self._routers.idle and not self._running:
                self.wait_until_up(on_poll)  # every router was lost
            while todo and self._routers.idle:
                router, index = self._routers.idle.pop(), todo.pop(0)
                self._running[self._order(router, source, plan, index)] = (router, index)
            ready, _ = ray.wait(list(self._running), timeout=POLL_S)
            on_poll()
            for ticket in ready:
                router, index = self._running.pop(ticket)
                if self._is_answered(ticket, router, index):
                    done += 1
                    on_done(done, plan.num_shards)
                else:
                    insort(todo, index)
            self._lose(self._welcome())
            if ready:
                self._follow_load()
                self._end_retired()

    def wait_until_up(self, on_poll: Callable[[], None] = lambda: None) -> None:
        """Until a router and a replica of every expert are up; `answer` begins so.

        Whoever is absent is given up once nobody has come up for `timeout_s`.

        Raises:
            WorkerError: one of them did not come up, unless it is an expert that may be left out.
        """
        reasons: dict[int, str] = {}
        before, since = self._absent(), time.monotonic()
        while absent := self._absent() - reasons.keys():
            on_poll()
            time.sleep(POLL_S)
            reasons |= self._welcome()
            if absent != before:
                before, since = absent, time.monotonic()
            if time.monotonic() - since > self._config.timeout_s:
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
        experts = [list(replicas.actors) for replicas in self.replicas]
        return router.answer.remote(source, plan, index, experts, settings)

    def _is_answered(self, ticket: ray.ObjectRef, router: ActorHandle, index: int) -> bool:
        """Take what a router found; False where it was lost, and the shard is to be asked again."""
        try:
            found = collect(ticket, f"the router of shard {index}")
        except WorkerLostError as error:
            self._losses[index] += 1
            if self._losses[index] > self._config.max_restarts:
                raise
            logger.warning("%s", error)
            self._routers.lose(router)
            return False
        self._routers.idle.append(router)
        self._take(found)
        return True

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
            WorkerError: it is not, or all routers are among them.
        """
        if ROUTER in reasons:
            raise WorkerError(f"no router: {reasons[ROUTER]}; start the same job again")
        self.lost |= reasons.keys()
        if reasons and not self._degrade:
            told = "; ".join(f"{self.replicas[i].name} stayed away ({reasons[i]})" for i in reasons)
            raise WorkerError(
                f"expert {told}; start the same job again to go on from the shards that are "
                "committed, or with degrade: true to leave it out"
            )

    def _absent(self) -> frozenset[int]:
        found = {i for i, replicas in enumerate(self.replicas) if not replicas.actors} - self.lost
        return frozenset(found if self._routers.idle or self._running else {ROUTER, *found})

    def _welcome(self) -> dict[int, str]:
        """Who is up gets work; of those that nobody is left to stand in for, why they are not."""
        reasons = {}
        for index, actor, error in self.pending.poll():
            replicas = self.replicas[index]
            if error is None:
                replicas.actors.append(actor)
                replicas.most = max(replicas.most, len(replicas.actors))
                continue
            logger.warning("a replica of %s did not come up: %s", replicas.name, error)
            left = len(replicas.actors) + self.pending.count(index)
            replicas.limit = max(1, left)  # more of them would fare no better
            if not left:
                reasons[index] = str(error).strip().splitlines()[-1]
        no_router = self._routers.poll()
        if no_router is not None and ROUTER in self._absent():
            reasons[ROUTER] = no_router
        return reasons

    def _follow_load(self) -> None:
        """The busiest expert has `max` replicas, the others in proportion."""
        busiest = max(replicas.load for replicas in self.replicas)
        for index, replicas in enumerate(self.replicas):
            if index in self.lost or busiest == 0:
                continue
            wanted = max(self._config.min, round(self._config.max * replicas.load / busiest))
            self._resize(index, min(replicas.limit, wanted))

    def _end_retired(self) -> None:
        """End replicas that no router may still ask."""
        kept = []
        for actor, orders in self._retired:
            if orders & self._running.keys():
                kept.append((actor, orders))
            else:
                ray.kill(actor)
        self._retired = kept

    def _resize(self, index: int, wanted: int) -> None:
        replicas = self.replicas[index]
        while len(replicas.actors) + self.pending.count(index) < wanted:
            self.pending.add(index, self._new_expert(replicas.name))
        while (
            self.pending.count(index) and len(replicas.actors) + self.pending.count(index) > wanted
        ):
            self.pending.drop(index)
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

    def _new_router(self) -> ActorHandle:
        config = self._config
        options = actor_options("experts", enabled=self._roles, cpus=config.router_cpus, gpus=0.0)
        # A lost one is replaced by the pool, with its shard.
        actor = ray.remote(RouterActor).options(**options, max_restarts=0, max_task_retries=0)
        return actor.remote(self._store.url, self._place, config.threads, self._attempt)
