"""Actors on their way: nothing is asked of one before it has a place on the cluster and answers."""

from typing import Generic, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from dist_tl.cluster.outcomes import named

Key = TypeVar("Key")


class PendingActors(Generic[Key]):
    """What a pool has started, and what it has lost sight of.

    Each actor has a key of the pool's choice. Its method `open`, which loads what it works with,
    is called at once; it must stand being called again.
    """

    def __init__(self) -> None:
        self._waiting: dict[ray.ObjectRef, tuple[Key, ActorHandle]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def actors(self) -> list[ActorHandle]:
        """All of them."""
        return [actor for _, actor in self._waiting.values()]

    def count(self, key: Key) -> int:
        """How many have a key."""
        return sum(other == key for other, _ in self._waiting.values())

    def add(self, key: Key, actor: ActorHandle) -> None:
        """Wait for an actor."""
        self._waiting[actor.open.remote()] = (key, actor)

    def drop(self, key: Key) -> None:
        """End one that has a key; the latest, which is the least likely to have a place."""
        ticket = [ticket for ticket, (other, _) in self._waiting.items() if other == key][-1]
        ray.kill(self._waiting.pop(ticket)[1])

    def poll(self, timeout_s: float = 0.0) -> list[tuple[Key, ActorHandle, RayError | None]]:
        """Those that have arrived, or died on the way: then with the reason.

        Raises:
            DistTLError: the named error that `open` met.
        """
        if not self._waiting:
            return []
        tickets = list(self._waiting)
        ready, _ = ray.wait(tickets, num_returns=len(tickets), timeout=timeout_s)
        found: list[tuple[Key, ActorHandle, RayError | None]] = []
        for ticket in ready:
            key, actor = self._waiting.pop(ticket)
            try:
                ray.get(ticket)
                found.append((key, actor, None))
            except RayTaskError as error:
                raise named(error, "an actor that starts") from None
            except ActorUnavailableError:  # it may come back, as long as the cluster believes so
                self.add(key, actor)
            except RayError as error:  # dead, out of memory, or its node could not be set up
                found.append((key, actor, error))
        return found
