"""The meeting point of driver, trainers and generators: a small Ray actor that holds no maths.

The driver posts training stages; the worker group takes them one after another, so that its
start-up is paid once a job. A group that was restarted takes the first unfinished stage again.

Specifications and results pass through as JSON text: to hold them as models, the actor would have
to import torch, and keep 400 MB for nothing.
"""

import asyncio
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle

from dist_tl.cluster.roles import beside_driver
from dist_tl.errors import DistTLError


@dataclass(frozen=True)
class Task:
    """One stage in the queue; `spec` is a StageSpec as JSON."""

    index: int
    spec: str


@dataclass(frozen=True)
class Snapshot:
    """What the driver needs to know of the group while it waits for one stage.

    Attributes:
        step, loss: of the stages that have begun, by stage name.
        result: of the stage that is waited for, once it is finished: a StageResult as JSON.
        error: why the group gave up, if it did.
        ready: whether the workers have asked for work yet.
    """

    step: dict[str, int]
    loss: dict[str, float]
    result: str | None
    error: DistTLError | None
    ready: bool


class Mailbox:
    """Use :func:`open_mailbox`; every method is called through Ray."""

    def __init__(self) -> None:
        self._specs: list[str] = []
        self._results: dict[int, str] = {}
        self._error: DistTLError | None = None
        self._ready = self._closed = False
        self._starts = 0
        self._step: dict[str, int] = {}
        self._loss: dict[str, float] = {}
        self._rank_positions: dict[str, dict[int, int]] = {}
        self._changed = asyncio.Condition()

    async def start(self) -> int:
        """A group begins its work; returns how many have."""
        self._starts += 1
        return self._starts

    async def post(self, spec: str) -> int:
        """Append a stage; returns its index."""
        async with self._changed:
            self._specs.append(spec)
            self._changed.notify_all()
            return len(self._specs) - 1

    async def take(self, after: int | None) -> Task | None:
        """The stage that follows `after`, or for a fresh worker the first unfinished one.

        Waits for it; None once the mailbox is closed.
        """
        async with self._changed:
            self._ready = True
            while not self._closed:
                index = self._first_unfinished() if after is None else after + 1
                if index < len(self._specs):
                    return Task(index, self._specs[index])
                await self._changed.wait()
            return None

    def _first_unfinished(self) -> int:
        indices = range(len(self._specs))
        return next((i for i in indices if i not in self._results), len(self._specs))

    async def progress(
        self,
        stage: str,
        rank: int,
        step: int,
        loss: float,
        source: str | None,
        position: int | None,
    ) -> None:
        """How far one rank is; `position` is its lowest needed shard of stage `source`."""
        self._step[stage] = step
        self._loss[stage] = loss
        if source is not None and position is not None:
            ranks = self._rank_positions.setdefault(source, {})
            # A group that was restarted repeats steps; its shards do not become new again.
            ranks[rank] = max(position, ranks.get(rank, 0))

    async def finish(self, index: int, result: str) -> None:
        """Rank 0 has stored a stage's result."""
        async with self._changed:
            self._results[index] = result
            self._changed.notify_all()

    async def give_up(self, error: DistTLError) -> None:
        """A rank met an error that trying again will not cure."""
        async with self._changed:
            self._error = self._error or error
            self._closed = True
            self._changed.notify_all()

    async def close(self) -> None:
        """No more stages: workers that ask get None and go home."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def snapshot(self, index: int) -> Snapshot:
        """What is known now; of the results, only that of stage `index`."""
        return Snapshot(
            step=dict(self._step),
            loss=dict(self._loss),
            result=self._results.get(index),
            error=self._error,
            ready=self._ready,
        )

    async def positions(self) -> dict[str, int]:
        """The lowest shard that the slowest rank still needs for the first time, by source."""
        return {source: min(ranks.values()) for source, ranks in self._rank_positions.items()}


def read_positions(mailbox: ActorHandle) -> dict[str, int]:
    """The lowest shard that each stage's readers still need for the first time, by stage name."""
    return ray.get(mailbox.positions.remote())


def open_mailbox() -> ActorHandle:
    """A mailbox that lives as long as this driver."""
    return ray.remote(Mailbox).options(**beside_driver(), max_concurrency=1000).remote()
