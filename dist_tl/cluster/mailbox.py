"""The mailbox between driver, trainers and generators: a small Ray actor.

The driver posts training stages; the worker group takes them one after another, so it starts only
once per job. A restarted group takes the first unfinished stage.

Specifications and results are JSON text: their models would make the actor import torch, which
takes 400 MB.
"""

import asyncio
from dataclasses import dataclass
from typing import cast

import ray
from ray.actor import ActorHandle

from dist_tl.cluster.roles import on_driver_node, start_actor
from dist_tl.errors import DistTLError


@dataclass(frozen=True)
class QueuedStage:
    """A stage in the queue; `spec` is a StageSpec as JSON."""

    index: int
    spec: str


@dataclass(frozen=True)
class Snapshot:
    """State of the worker group while the driver waits for one stage.

    Attributes:
        step, loss: latest step and loss of the started stages, by stage name.
        result: StageResult of the awaited stage as JSON; None if it is not finished.
        error: the error that stopped the group, if any.
        ready: whether the workers have requested a stage yet.
    """

    step: dict[str, int]
    loss: dict[str, float]
    result: str | None
    error: DistTLError | None
    ready: bool


class Mailbox:
    """The actor class; create one with :func:`open_mailbox` and call its methods through Ray."""

    def __init__(self) -> None:
        self._specs: list[str] = []
        self._results: dict[int, str] = {}
        self._error: DistTLError | None = None
        self._ready = self._closed = False
        self._group_starts = 0
        self._step: dict[str, int] = {}
        self._loss: dict[str, float] = {}
        self._rank_positions: dict[str, dict[int, int]] = {}
        self._changed = asyncio.Condition()

    async def count_group_start(self) -> int:
        """Counts the start of a worker group; returns the number of starts."""
        self._group_starts += 1
        return self._group_starts

    async def post(self, spec: str) -> int:
        """Queues a stage; returns its index."""
        async with self._changed:
            self._specs.append(spec)
            self._changed.notify_all()
            return len(self._specs) - 1

    async def take(self, after: int | None) -> QueuedStage | None:
        """Returns the stage after index `after`, or for a new worker the first unfinished stage.

        Waits until it is queued; returns None once the mailbox is closed.
        """
        async with self._changed:
            self._ready = True
            while not self._closed:
                index = self._first_unfinished() if after is None else after + 1
                if index < len(self._specs):
                    return QueuedStage(index, self._specs[index])
                await self._changed.wait()
            return None

    def _first_unfinished(self) -> int:
        indices = range(len(self._specs))
        return next((i for i in indices if i not in self._results), len(self._specs))

    async def report_progress(
        self,
        stage: str,
        rank: int,
        step: int,
        loss: float,
        source: str | None,
        position: int | None,
    ) -> None:
        """Reports the progress of one rank; `position` is its lowest needed shard of `source`."""
        self._step[stage] = step
        self._loss[stage] = loss
        if source is not None and position is not None:
            ranks = self._rank_positions.setdefault(source, {})
            # A restarted group repeats steps, but not the generation of their shards.
            ranks[rank] = max(position, ranks.get(rank, 0))

    async def finish(self, index: int, result: str) -> None:
        """Reports a stage whose result rank 0 has stored."""
        async with self._changed:
            self._results[index] = result
            self._changed.notify_all()

    async def fail(self, error: DistTLError) -> None:
        """Stops the group because of an error that a retry cannot fix; keeps the first error."""
        async with self._changed:
            self._error = self._error or error
            self._closed = True
            self._changed.notify_all()

    async def close(self) -> None:
        """Closes the queue: workers get None and exit."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def snapshot(self, index: int) -> Snapshot:
        """Returns the current state, with the result of stage `index` only."""
        return Snapshot(
            step=dict(self._step),
            loss=dict(self._loss),
            result=self._results.get(index),
            error=self._error,
            ready=self._ready,
        )

    async def positions(self) -> dict[str, int]:
        """Returns the lowest shard that the slowest rank has not read yet, by source stage."""
        return {source: min(ranks.values()) for source, ranks in self._rank_positions.items()}


def read_positions(mailbox: ActorHandle) -> dict[str, int]:
    """Returns the lowest shard that each stage's readers have not read yet, by stage name."""
    # Ray's stub does not know the types of actor methods.
    return cast(dict[str, int], ray.get(mailbox.positions.remote()))


def open_mailbox() -> ActorHandle:
    """Starts a mailbox that lives as long as this driver."""
    return start_actor(Mailbox, {**on_driver_node(), "max_concurrency": 1000})
