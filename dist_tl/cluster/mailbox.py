"""The meeting point of driver, trainers and generators: a small Ray actor that holds no maths.

The driver posts training stages; the worker group takes them one after another, so that its
start-up is paid once a job. A group that was restarted takes the first unfinished stage again.
"""

import asyncio
from dataclasses import dataclass, field

import ray
from ray.actor import ActorHandle

from dist_tl.errors import DistTLError
from dist_tl.train.spec import StageResult, StageSpec


@dataclass(frozen=True)
class Task:
    """One stage in the queue."""

    index: int
    spec: StageSpec


@dataclass
class Snapshot:
    """What the driver needs to know of the group.

    Attributes:
        step, loss: of the stage at work, by stage name.
        positions: the lowest shard that a stage's readers still need for the first time.
        results: of finished stages, by index.
        error: why the group gave up, if it did.
        ready: whether the workers have asked for work yet.
    """

    step: dict[str, int] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    results: dict[int, StageResult] = field(default_factory=dict)
    error: DistTLError | None = None
    ready: bool = False


class Mailbox:
    """Use :func:`open_mailbox`; every method is called through Ray."""

    def __init__(self) -> None:
        self._specs: list[StageSpec] = []
        self._state = Snapshot()
        self._closed = False
        self._rank_positions: dict[str, dict[int, int]] = {}
        self._changed = asyncio.Condition()

    async def post(self, spec: StageSpec) -> int:
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
            self._state.ready = True
            while not self._closed:
                index = self._first_unfinished() if after is None else after + 1
                if index < len(self._specs):
                    return Task(index, self._specs[index])
                await self._changed.wait()
            return None

    def _first_unfinished(self) -> int:
        done = self._state.results
        return next((i for i in range(len(self._specs)) if i not in done), len(self._specs))

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
        self._state.step[stage] = step
        self._state.loss[stage] = loss
        if source is not None and position is not None:
            ranks = self._rank_positions.setdefault(source, {})
            ranks[rank] = max(position, ranks.get(rank, 0))
            self._state.positions[source] = min(ranks.values())

    async def finish(self, index: int, result: StageResult) -> None:
        """Rank 0 has stored a stage's result."""
        async with self._changed:
            self._state.results[index] = result
            self._changed.notify_all()

    async def give_up(self, error: DistTLError) -> None:
        """A rank met an error that trying again will not cure."""
        async with self._changed:
            self._state.error = self._state.error or error
            self._closed = True
            self._changed.notify_all()

    async def close(self) -> None:
        """No more stages: workers that ask get None and go home."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def snapshot(self) -> Snapshot:
        """A copy of what is known now."""
        return self._state


def read_positions(mailbox: ActorHandle) -> dict[str, int]:
    """The lowest shard that each stage's readers still need for the first time, by stage name."""
    return ray.get(mailbox.snapshot.remote()).positions


def open_mailbox() -> ActorHandle:
    """A mailbox that lives as long as this driver."""
    return ray.remote(Mailbox).options(num_cpus=0, max_concurrency=1000).remote()
