"""Which shard holds which sample, and which sample is read when: pure functions of a plan.

Lanes, not ranks, define the data order. Shard i lies on lane i mod L; a global batch takes the same
number of samples from every lane; ranks share out whole lanes. So what is read at step t does not
depend on how many ranks read. Along a lane, epochs follow each other without a gap.

Nothing here may ever change, for stored cursors and seeds must keep their meaning: permutations are
stable sorts of raw PCG64 words, because numpy promises that stream for all time, and promises
nothing about its shuffles.
"""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dist_tl.config import StrictModel, fingerprint
from dist_tl.errors import ConfigError
from dist_tl.seeds import derive_seed


class ShardOrder(StrictModel):
    """Everything that fixes one shard: a request that any worker can fulfil, twice if need be."""

    stage: str = Field(description="Name of the stage that the shard belongs to.")
    fingerprint: str = Field(description="Changes when anything that fixes the bytes changes.")
    purpose: str = Field(description="What the samples' draws are for; part of their seeds.")
    seed: int = Field(description="The run's seed.")
    index: int = Field(ge=0, description="Number of the shard in its stage.")
    first_sample: int = Field(ge=0, description="Number of the shard's first sample.")
    num_samples: int = Field(ge=1, description="Samples in the shard; their numbers follow on.")
    format: Literal["png", "npy"] = Field(default="png", description="How images are stored.")

    @property
    def numbers(self) -> range:
        """The numbers of the shard's samples, in order."""
        return range(self.first_sample, self.first_sample + self.num_samples)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for this order in the shard's entry."""
        return fingerprint(self)


class ShardPlan(StrictModel):
    """All shards of a stage, and how they are to be read."""

    stage: str = Field(description="Name of the stage.")
    fingerprint: str = Field(description="Of everything that fixes the bytes: generator, seeds...")
    purpose: str = Field(description="What the samples' draws are for; part of their seeds.")
    seed: int = Field(description="The run's seed, for samples and for the order of reading.")
    num_samples: int = Field(ge=1, description="Samples in the stage.")
    samples_per_shard: int = Field(
        ge=1, description="Samples in every shard; the last may be short."
    )
    lanes: int = Field(ge=1, description="Fixed sequences of shards that ranks share out.")
    window: int = Field(
        ge=1, description="Consecutive shards of a lane that are shuffled together."
    )
    format: Literal["png", "npy"] = Field(default="png", description="How images are stored.")
    first_sample: int = Field(default=0, ge=0, description="Number of the stage's first sample.")

    @property
    def num_shards(self) -> int:
        """Shards in the stage."""
        return -(-self.num_samples // self.samples_per_shard)

    def shard_size(self, index: int) -> int:
        """Samples in shard `index`."""
        return min(self.samples_per_shard, self.num_samples - index * self.samples_per_shard)

    def order(self, index: int) -> ShardOrder:
        """The order of shard `index`.

        Raises:
            ValueError: there is no such shard.
        """
        if not 0 <= index < self.num_shards:
            raise ValueError(f"expected a shard in 0..{self.num_shards - 1}, got {index}")
        return ShardOrder(
            stage=self.stage,
            fingerprint=self.fingerprint,
            purpose=self.purpose,
            seed=self.seed,
            index=index,
            first_sample=self.first_sample + index * self.samples_per_shard,
            num_samples=self.shard_size(index),
            format=self.format,
        )


def orders(plan: ShardPlan) -> Iterator[ShardOrder]:
    """The orders of all shards of a stage, in order of their index."""
    return map(plan.order, range(plan.num_shards))


def rank_lanes(lanes: int, rank: int, world_size: int) -> range:
    """The lanes that rank `rank` of `world_size` reads."""
    return range(rank * lanes // world_size, (rank + 1) * lanes // world_size)


def check_sizes(plan: ShardPlan, *, batch_size: int, world_size: int) -> None:
    """Check that batches and ranks can share out the lanes of a plan.

    Raises:
        ConfigError: they cannot; names the nearest sizes that work, on either side.
    """
    lanes, shards = plan.lanes, plan.num_shards
    if batch_size < 1 or world_size < 1:
        raise ConfigError(
            f"expected batch_size and world_size >= 1, got {batch_size} and {world_size}"
        )
    if lanes > shards:
        raise ConfigError(f"stage {plan.stage!r}: {lanes} lanes but {_few_shards(plan)}")
    if lanes % world_size:
        ranks = _nearest(world_size, (n for n in range(1, lanes + 1) if lanes % n == 0))
        others = _nearest(lanes, range(world_size, lanes + world_size + 1, world_size))
        raise ConfigError(
            f"stage {plan.stage!r}: {lanes} lanes cannot be shared by {world_size} ranks; "
            f"use {ranks} ranks, or {others} lanes"
        )
    if batch_size % lanes:
        sizes = _nearest(batch_size, range(lanes, batch_size + lanes + 1, lanes))
        raise ConfigError(
            f"stage {plan.stage!r}: a batch of {batch_size} cannot take the same number of samples "
            f"from each of {lanes} lanes; use a batch of {sizes}"
        )


def _few_shards(plan: ShardPlan) -> str:
    shards = f"only {plan.num_shards} shards; use at most {plan.num_shards} lanes"
    if plan.lanes > plan.num_samples:
        return f"{shards}, or at least {plan.lanes} samples"
    # ceil(M / S) >= L holds exactly for S <= (M - 1) / (L - 1).
    return f"{shards}, or at most {(plan.num_samples - 1) // (plan.lanes - 1)} samples a shard"


def _nearest(value: int, candidates: Iterable[int]) -> str:
    known = list(candidates)
    below = max((n for n in known if n < value), default=None)
    above = min((n for n in known if n > value), default=None)
    return " or ".join(str(n) for n in (below, above) if n is not None)


@dataclass(frozen=True)
class Window:
    """Some consecutive shards of a lane in one of its epochs, shuffled together.

    Attributes:
        start: position of its first sample on the endless lane; `stop` is one past its last.
        shards: indices of its shards, in the order of the lane's epoch.
    """

    lane: int
    epoch: int
    index: int
    start: int
    stop: int
    shards: tuple[int, ...]


class DataOrder:
    """Which samples make up global batch t, for every t, without reading anything."""

    def __init__(self, plan: ShardPlan, *, seed: int | None = None) -> None:
        """Follow `plan`; `seed` shuffles in place of the plan's own.

        Raises:
            ConfigError: the plan has more lanes than shards.
        """
        check_sizes(plan, batch_size=plan.lanes, world_size=1)
        self.plan = plan
        self.seed = plan.seed if seed is None else seed
        # Two per lane: a batch may cross from one window or epoch into the next.
        self._epoch = lru_cache(2 * plan.lanes)(self._permuted_lane)
        self._windows = lru_cache(2 * plan.lanes)(self._window)
        self._rows = lru_cache(2 * plan.lanes)(self._shuffled_window)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when the samples or their order change."""
        return fingerprint({"plan": self.plan.model_dump(mode="json"), "seed": self.seed})

    def lane_length(self, lane: int) -> int:
        """Samples in one epoch of a lane."""
        return self._num_shards(lane) * self.plan.samples_per_shard - self._deficit(lane)

    def _num_shards(self, lane: int) -> int:
        return (self.plan.num_shards - lane + self.plan.lanes - 1) // self.plan.lanes

    def _deficit(self, lane: int) -> int:
        """Samples that the lane's shards lack to full ones: only the last shard may be short."""
        last = self.plan.num_shards - 1
        if last % self.plan.lanes != lane:
            return 0
        return self.plan.samples_per_shard - self.plan.shard_size(last)

    def _permuted_lane(self, lane: int, epoch: int) -> tuple[NDArray[np.int64], int]:
        """Shards of the lane in the order of an epoch, and the window that holds the short one."""
        shards = np.arange(lane, self.plan.num_shards, self.plan.lanes, dtype=np.int64)
        if epoch:
            shards = shards[_permutation(len(shards), self.seed, "lane order", epoch, lane)]
        if not self._deficit(lane):
            return shards, len(shards)
        place = int(np.flatnonzero(shards == self.plan.num_shards - 1)[0])
        return shards, place // self.plan.window

    def window_at(self, lane: int, position: int) -> Window:
        """The window that holds sample `position` of the endless lane. Arithmetic, no search."""
        if position < 0 or not 0 <= lane < self.plan.lanes:
            raise ValueError(f"no position {position} on lane {lane} of {self.plan.lanes}")
        epoch, offset = divmod(position, self.lane_length(lane))
        full, deficit = self.plan.window * self.plan.samples_per_shard, self._deficit(lane)
        short = self._epoch(lane, epoch)[1]
        index = offset // full
        if index >= short:
            # Every window behind the short one begins `deficit` samples early.
            index = (offset + deficit) // full
        return self._windows(lane, epoch, index)

    def _window(self, lane: int, epoch: int, index: int) -> Window:
        shards, short = self._epoch(lane, epoch)
        first, size = index * self.plan.window, self.plan.samples_per_shard
        members = shards[first : first + self.plan.window]
        deficit = self._deficit(lane)
        start = epoch * self.lane_length(lane) + first * size - (deficit if index > short else 0)
        stop = start + len(members) * size - (deficit if index == short else 0)
        return Window(lane, epoch, index, start, stop, tuple(members.tolist()))

    def windows(self, lane: int, position: int) -> Iterator[Window]:
        """The window at `position` and all that follow it on the lane, without end."""
        while True:
            window = self.window_at(lane, position)
            yield window
            position = window.stop

    def window_rows(self, window: Window) -> NDArray[np.int64]:
        """int64 [n, 2]: shard and row of every sample of a window, in reading order. Read-only."""
        return self._rows(window)

    def _shuffled_window(self, window: Window) -> NDArray[np.int64]:
        pieces = [
            np.stack([np.full(size, shard), np.arange(size)], axis=1)
            for shard in window.shards
            for size in (self.plan.shard_size(shard),)
        ]
        rows = np.concatenate(pieces).astype(np.int64)
        rows = rows[
            _permutation(len(rows), self.seed, "window", window.epoch, window.lane, window.index)
        ]
        rows.setflags(write=False)
        return rows

    def lane_windows(self, lane: int, start: int, count: int) -> list[tuple[Window, int, int]]:
        """Where samples [start, start + count) of a lane lie: (window, first, one past the last).

        The two positions count from the beginning of the window.
        """
        parts, stop = [], start + count
        while start < stop:
            window = self.window_at(lane, start)
            end = min(stop, window.stop)
            parts.append((window, start - window.start, end - window.start))
            start = end
        return parts

    def lane_samples(self, lane: int, start: int, count: int) -> NDArray[np.int64]:
        """int64 [count, 2]: shard and row of samples [start, start + count) of the endless lane."""
        parts = self.lane_windows(lane, start, count)
        pieces = [self.window_rows(window)[first:last] for window, first, last in parts]
        return np.concatenate(pieces) if pieces else np.empty((0, 2), np.int64)

    def batch(
        self, step: int, batch_size: int, *, lanes: Iterable[int] | None = None
    ) -> list[NDArray[np.int64]]:
        """Shard and row of the samples of global batch `step`, one int64 [B / L, 2] per lane.

        Args:
            step: global batches before this one, the cursor.
            batch_size: size of the global batch.
            lanes: the lanes to look at, a rank's own; by default all.

        Raises:
            ConfigError: the batch cannot be shared by the lanes.
        """
        check_sizes(self.plan, batch_size=batch_size, world_size=1)
        share = batch_size // self.plan.lanes
        lanes = range(self.plan.lanes) if lanes is None else lanes
        return [self.lane_samples(lane, step * share, share) for lane in lanes]

    def batch_numbers(
        self, step: int, batch_size: int, *, lanes: Iterable[int] | None = None
    ) -> NDArray[np.int64]:
        """int64 [b]: sample numbers of global batch `step`, lane after lane."""
        rows = np.concatenate(self.batch(step, batch_size, lanes=lanes))
        return self.plan.first_sample + rows[:, 0] * self.plan.samples_per_shard + rows[:, 1]

    def reach(self, batch_size: int) -> int:
        """Shards that must be let exist, from `ShardStream.position` on, for a batch to be whole.

        With fewer, generators that are held back and readers that wait hold up each other for ever.
        Twice as many keep the reader from waiting at the end of every window.
        """
        check_sizes(self.plan, batch_size=batch_size, world_size=1)
        share, full = batch_size // self.plan.lanes, self.plan.window * self.plan.samples_per_shard
        return self.plan.lanes * self.plan.window * ((share - 1) // full + 2)

    def windows_needed(
        self, step: int, batch_size: int, *, lanes: Iterable[int] | None = None
    ) -> Iterator[Window]:
        """Windows in the order in which batches from `step` on open them, without end."""
        share = batch_size // self.plan.lanes
        lanes = range(self.plan.lanes) if lanes is None else lanes
        streams = [self.windows(lane, step * share) for lane in lanes]
        return heapq.merge(*streams, key=lambda window: window.start)


def _permutation(count: int, seed: int, purpose: str, *index: int) -> NDArray[np.int64]:
    words = np.random.PCG64(derive_seed(seed, purpose, *index)).random_raw(count)
    return np.argsort(words, kind="stable")
