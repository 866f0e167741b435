"""The expert pool: routers and experts as Ray actors, which predict a data set shard by shard.

A router reads a shard, sends each expert only the samples routed to it, combines the logits and
commits the predictions as a shard. The number of an expert's replicas follows its load. A lost
actor is restarted and its batch repeated; committed shards are never predicted again.
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
from dist_tl.cluster.roles import actor_options, start_actor
from dist_tl.cluster.router_pool import RouterPool
from dist_tl.cluster.routers import RequestSettings, RouterActor, ShardResult
from dist_tl.errors import WorkerError, WorkerLostError
from dist_tl.models.networks import Network
from dist_tl.shards.manifest import committed_indices
from dist_tl.shards.order import ShardPlan
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.hub_model import load_expert

logger = logging.getLogger(__name__)
POLL_S = 0.2
ROUTER = -1  # stands for all routers among the indices of unavailable experts
LOAD_MEMORY = 0.7  # decay of the moving average of an expert's load


class ExpertActor:
    """One expert on one device."""

    def __init__(self, store_url: str, location: str, name: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = True
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._source = (ObjectStore(store_url), location, name)
        self._expert: Network | None = None

    def open(self) -> None:
        """Loads the expert, unless it is loaded.

        Raises:
            ConfigError: files are missing or damaged.
        """
        self._expert = self._expert or load_expert(*self._source).to(self._device)

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits (S, C), float32 on the CPU, of images (S, C, H, W) in [-1, 1]."""
        self.open()  # Ray does not call it after a restart
        assert self._expert is not None, "open loads it"
        return self._expert(images.to(self._device)).float().cpu()


@dataclass
class Replicas:
    """The actors of one expert.

    Attributes:
        limit: maximum number of actors; lowered if the cluster cannot start more.
        load: moving average of the expert's share of all (sample, expert) pairs.
        pairs: total number of samples sent to the expert.
        most: highest number of actors so far.
    """

    name: str
    limit: int
    actors: list[ActorHandle] = field(default_factory=list)
    load: float = 0.0
    pairs: int = 0
    most: int = 0


class ExpertPool:
    """Context manager of the actors; :meth:`answer` predicts and commits a data set.

    Args:
        location: location of the stored hub: a key of the run, or a URL.
        experts: names of the experts, in the order of the hub.
        degrade: predict without unavailable experts, instead of raising.
        roles: whether the cluster's nodes have roles.
        attempt: number of the attempt; a superseded attempt commits nothing. 0 disables the check.

    Attributes:
        replicas: replicas of each expert.
        pending: replicas that are not ready yet, by index of the expert.
        lost: indices of experts that are left out.
    """

    def __init__(
        self,
        config: ExpertsConfig,
        store: ObjectStore,
        location: str,
        experts: Sequence[str],
        *,
        degrade: bool,
        roles: bool = False,
        attempt: int = 0,
    ) -> None:
        self._config, self._store, self._location = config, store, location
        self._degrade, self._roles, self._attempt = degrade, roles, attempt
        self.replicas = [Replicas(name, config.max) for name in experts]
        self.lost: frozenset[int] = frozenset()
        self.pending: PendingActors[int] = PendingActors()
        self._router_losses: Counter[int] = Counter()  # by shard
        self._running: dict[ray.ObjectRef, tuple[ActorHandle, int]] = {}
        # Replicas that get no new requests, each with the running shards that may still use it.
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
        if kind is not None:  # the session stops all actors
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
        """Predicts every shard without committed predictions, one per router at a time.

        Args:
            plan: shard plan of the predictions.
            on_done: called with the number of committed shards and of all shards.

        Raises:
            WorkerError: an expert is unavailable and may not be left out, or too few are left.
            DistTLError: the named error that an actor raised.
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
                self._running[self._submit(router, source, plan, index)] = (router, index)
            ready, _ = ray.wait(list(self._running), timeout=POLL_S)
            on_poll()
            for ref in ready:
                router, index = self._running.pop(ref)
                if self._complete(ref, router, index):
                    done += 1
                    on_done(done, plan.num_shards)
                else:
                    insort(todo, index)
            self._exclude(self._admit_ready())
            if ready:
                self._rebalance()
                self._kill_retired()

    def wait_until_up(self, on_poll: Callable[[], None] = lambda: None) -> None:
        """Waits for one router and one replica of every expert; `answer` calls this first.

        The timeout `timeout_s` restarts whenever an actor becomes ready.

        Raises:
            WorkerError: an actor did not start, unless it is an expert that may be left out.
        """
        reasons: dict[int, str] = {}
        before, since = self._unavailable(), time.monotonic()
        while unavailable := self._unavailable() - reasons.keys():
            on_poll()
            time.sleep(POLL_S)
            reasons |= self._admit_ready()
            if unavailable != before:
                before, since = unavailable, time.monotonic()
            if time.monotonic() - since > self._config.timeout_s:
                reason = (
                    f"not ready after {self._config.timeout_s:g} s; does the cluster have enough "
                    "free resources?"
                )
                reasons |= dict.fromkeys(unavailable - reasons.keys(), reason)
        self._exclude(reasons)

    def _submit(
        self, router: ActorHandle, source: StageInput | RowsInput, plan: ShardPlan, index: int
    ) -> ray.ObjectRef:
        settings = RequestSettings(
            batch_size=self._config.batch_size,
            timeout_s=self._config.timeout_s,
            degrade=self._degrade,
            missing=self.lost,
        )
        experts = [list(replicas.actors) for replicas in self.replicas]
        return router.predict.remote(source, plan, index, experts, settings)

    def _complete(self, ref: ray.ObjectRef, router: ActorHandle, index: int) -> bool:
        """Collects the result of a shard; returns False if the router was lost: try again."""
        try:
            result = collect(ref, f"the router of shard {index}")
        except WorkerLostError as error:
            self._router_losses[index] += 1
            if self._router_losses[index] > self._config.max_restarts:
                raise
            logger.warning("%s", error)
            self._routers.replace(router)
            return False
        self._routers.idle.append(router)
        self._record(result)
        return True

    def _record(self, result: ShardResult) -> None:
        self._exclude(result.lost)
        total = sum(result.pairs)
        for replicas, pairs in zip(self.replicas, result.pairs, strict=True):
            replicas.pairs += pairs
            if total:
                share = pairs / total
                replicas.load = LOAD_MEMORY * replicas.load + (1 - LOAD_MEMORY) * share

    def _exclude(self, reasons: dict[int, str]) -> None:
        """Leaves experts out from now on.

        Raises:
            WorkerError: experts may not be left out, or no router is available.
        """
        if ROUTER in reasons:
            raise WorkerError(f"no router: {reasons[ROUTER]}; start the same job again")
        self.lost |= reasons.keys()
        if reasons and not self._degrade:
            experts = "; ".join(
                f"{self.replicas[i].name} is unavailable ({reason})"
                for i, reason in reasons.items()
            )
            raise WorkerError(
                f"expert {experts}; start the same job again to resume from the committed shards, "
                "or with degrade: true to leave it out"
            )

    def _unavailable(self) -> frozenset[int]:
        experts = {i for i, replicas in enumerate(self.replicas) if not replicas.actors} - self.lost
        has_router = self._routers.idle or self._running
        return frozenset(experts if has_router else {ROUTER, *experts})

    def _admit_ready(self) -> dict[int, str]:
        """Admits ready actors; returns experts without any actor left, with the reason."""
        reasons = {}
        for index, actor, error in self.pending.poll():
            replicas = self.replicas[index]
            if error is None:
                replicas.actors.append(actor)
                replicas.most = max(replicas.most, len(replicas.actors))
                continue
            logger.warning("a replica of %s did not start: %s", replicas.name, error)
            left = len(replicas.actors) + self.pending.count(index)
            replicas.limit = max(1, left)  # another replica would fail as well
            if not left:
                reasons[index] = str(error).strip().splitlines()[-1]
        router_error = self._routers.poll()
        if router_error is not None and ROUTER in self._unavailable():
            reasons[ROUTER] = router_error
        return reasons

    def _rebalance(self) -> None:
        """Gives the busiest expert `max` replicas, the others a proportional number."""
        busiest = max(replicas.load for replicas in self.replicas)
        for index, replicas in enumerate(self.replicas):
            if index in self.lost or busiest == 0:
                continue
            wanted = max(self._config.min, round(self._config.max * replicas.load / busiest))
            self._resize(index, min(replicas.limit, wanted))

    def _kill_retired(self) -> None:
        """Kills retired replicas that no running shard uses."""
        kept = []
        for actor, shards in self._retired:
            if shards & self._running.keys():
                kept.append((actor, shards))
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
            self.pending.cancel_latest(index)
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
        options |= {
            "scheduling_strategy": "SPREAD",
            "max_restarts": config.max_restarts,
            "max_task_retries": config.max_restarts,
        }
        return start_actor(
            ExpertActor, options, self._store.url, self._location, name, config.threads
        )

    def _new_router(self) -> ActorHandle:
        config = self._config
        options = actor_options("experts", enabled=self._roles, cpus=config.router_cpus, gpus=0.0)
        # The pool replaces a lost router and repeats its shard.
        options |= {"max_restarts": 0, "max_task_retries": 0}
        return start_actor(
            RouterActor, options, self._store.url, self._location, config.threads, self._attempt
        )
