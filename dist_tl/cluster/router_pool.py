"""Keeps the routers of an expert pool at a fixed number: replaces those that die."""

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
    """Pending and idle routers; the caller holds the busy ones.

    Args:
        new: starts a router.
        count: total number of routers.
        max_restarts: how often in a row routers may die during start-up.
        run: URL of the run, for metrics.

    Attributes:
        idle: routers that are ready and have no shard.
    """

    def __init__(
        self, new: Callable[[], ActorHandle], count: int, max_restarts: int, run: str
    ) -> None:
        self._new, self._max_restarts = new, max_restarts
        self._restarts = RestartMetrics(run, "routers")
        self._pending: PendingActors[None] = PendingActors()
        self._replace_at: list[float] = []  # monotonic times at which to replace dead routers
        self._failed_starts = 0  # in a row
        self.idle: list[ActorHandle] = []
        for _ in range(count):
            self._pending.add(None, new())

    @property
    def actors(self) -> list[ActorHandle]:
        """All routers that are not busy."""
        return [*self._pending.actors, *self.idle]

    def poll(self) -> str | None:
        """Starts due replacements and admits ready routers.

        Returns:
            The reason why routers died during start-up, once they did so too often in a row.

        Raises:
            DistTLError: the named error that a router raised when it opened the hub.
        """
        self._start_due()
        errors = []
        for _, router, error in self._pending.poll():
            if error is None:
                self.idle.append(router)
                self._failed_starts = 0
            else:
                errors.append(str(error).strip().splitlines()[-1])
        if not errors:
            return None
        # Back off: until the cluster notices that a node is gone, it may select that node again.
        self._failed_starts += 1
        pause_s = min(MAX_PAUSE_S, PAUSE_S * 2 ** min(self._failed_starts, 6))
        self._replace_at += [time.monotonic() + pause_s] * len(errors)
        logger.warning("%d routers died during start-up: %s", len(errors), errors[0])
        return errors[0] if self._failed_starts > self._max_restarts else None

    def replace(self, router: ActorHandle) -> None:
        """Kills a router that does not respond, and starts another at the next poll."""
        ray.kill(router)
        self._replace_at.append(time.monotonic())
        # Idle routers may be lost with the same node: none gets a shard before it responds again.
        while self.idle:
            self._pending.add(None, self.idle.pop())

    def _start_due(self) -> None:
        now = time.monotonic()
        num_due = sum(at <= now for at in self._replace_at)
        self._replace_at = [at for at in self._replace_at if at > now]
        for _ in range(num_due):
            self._restarts.count()
            self._pending.add(None, self._new())
