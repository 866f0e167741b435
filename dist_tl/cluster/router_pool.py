"""The routers of an expert pool: as many as there should be, whatever becomes of them."""

import logging
import time
from collections.abc import Callable

import ray
from ray.actor import ActorHandle

from dist_tl.cluster.metrics import RestartMetrics
from dist_tl.cluster.pending import PendingActors

logger = logging.getLogger(__name__)
PAUSE_S, MAX_PAUSE_S = 1.0, 32.0


class RouterPool:
    """Routers on their way, and routers without work; those at work are the caller's.

    Args:
        new: starts a router.
        count: routers in all.
        max_restarts: how often in a row they may die on their way.

    Attributes:
        idle: routers that are up and have no shard.
    """

    def __init__(
        self, new: Callable[[], ActorHandle], count: int, max_restarts: int, run: str
    ) -> None:
        self._new, self._max_restarts = new, max_restarts
        self._restarts = RestartMetrics(run, "routers")
        self._arrivals: PendingActors[None] = PendingActors()
        self._due: list[float] = []  # when to start others for those that were lost
        self._lost_in_a_row = 0
        self.idle: list[ActorHandle] = []
        for _ in range(count):
            self._arrivals.add(None, new())

    @property
    def actors(self) -> list[ActorHandle]:
        """All that are not at work."""
        return [*self._arrivals.actors, *self.idle]

    def poll(self) -> str | None:
        """Start and welcome routers; where they die on their way too often, why.

        Raises:
            DistTLError: the named error that a router met when it opened the hub.
        """
        self._start_due()
        errors = []
        for _, router, error in self._arrivals.poll():
            if error is None:
                self.idle.append(router)
                self._lost_in_a_row = 0
            else:
                errors.append(str(error).strip().splitlines()[-1])
        if not errors:
            return None
        # The cluster may not know yet that a node is gone, and choose it again: all the less often.
        self._lost_in_a_row += 1
        pause_s = min(MAX_PAUSE_S, PAUSE_S * 2 ** min(self._lost_in_a_row, 6))
        self._due += [time.monotonic() + pause_s] * len(errors)
        logger.warning("%d routers died on their way: %s", len(errors), errors[0])
        return errors[0] if self._lost_in_a_row > self._max_restarts else None

    def lose(self, router: ActorHandle) -> None:
        """Give a router up that does not answer; another is started."""
        ray.kill(router)
        self._due.append(time.monotonic())
        # Others may have gone with the same node: none gets a shard before it answers.
        while self.idle:
            self._arrivals.add(None, self.idle.pop())

    def _start_due(self) -> None:
        now = time.monotonic()
        num_due = sum(at <= now for at in self._due)
        self._due = [at for at in self._due if at > now]
        for _ in range(num_due):
            self._restarts.count()
            self._arrivals.add(None, self._new())
