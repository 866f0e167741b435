"""Tracks pending actors: a pool assigns work to an actor only after its `open` has returned."""

from typing import Generic, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from dist_tl.cluster.outcomes import unwrap_error

Key = TypeVar("Key")


class PendingActors(Generic[Key]):
    """Actors that a pool has started, or may have lost, and that are not known to be ready.

    The pool chooses a key for each actor. Adding an actor calls its method `open`, which loads the
    actor's model; `open` must be safe to call again.
    """

    def __init__(self) -> None:
        self._opening: dict[ray.ObjectRef, tuple[Key, ActorHandle]] = {}

    def __len__(self) -> int:
        return len(self._opening)

    @property
    def actors(self) -> list[ActorHandle]:
        """All pending actors."""
        return [actor for _, actor in self._opening.values()]

    def count(self, key: Key) -> int:
        """Returns the number of pending actors with `key`."""
        return sum(other == key for other, _ in self._opening.values())

    def add(self, key: Key, actor: ActorHandle) -> None:
        """Opens an actor and tracks it until it is ready."""
        self._opening[actor.open.remote()] = (key, actor)

    def cancel_latest(self, key: Key) -> None:
        """Kills the latest actor with `key`, which is the least likely to be scheduled yet."""
        matching = [ref for ref, (other, _) in self._opening.items() if other == key]
        _, actor = self._opening.pop(matching[-1])
        ray.kill(actor)

    def poll(self, timeout_s: float = 0.0) -> list[tuple[Key, ActorHandle, RayError | None]]:
        """Returns and forgets the actors that are ready (error None) or dead (with the error).

        Raises:
            DistTLError: the named error that `open` raised.
        """
        if not self._opening:
            return []
        refs = list(self._opening)
        finished, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
        outcomes: list[tuple[Key, ActorHandle, RayError | None]] = []
        for ref in finished:
            key, actor = self._opening.pop(ref)
            try:
                ray.get(ref)
                outcomes.append((key, actor, None))
            except RayTaskError as error:
                raise unwrap_error(error, "the start of an actor") from None
            except ActorUnavailableError:  # it may recover: the cluster does not report it dead
                self.add(key, actor)
            except RayError as error:  # dead, out of memory, or its node could not be set up
                outcomes.append((key, actor, error))
        return outcomes
