"""Assignment of samples to shards and to batches: pure functions of a plan.

The data order is defined by lanes, not ranks. Shard i is on lane i mod L, a global batch takes the
same number of samples from every lane, and each rank reads whole lanes. So the batch at step t does
not depend on the number of ranks. On each lane, epochs follow each other without gaps.

This module must never change its results, because stored cursors and seeds depend on them.
Permutations are stable sorts of raw PCG64 words: numpy guarantees that stream but not its shuffles.
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
    """Request for one shard. It determines the shard's bytes, so any worker can process it."""

    stage: str = Field(description="Name of the shard's stage.")
    fingerprint: str = Field(description="Fingerprint of everything that determines the bytes.")
    purpose: str = Field(description="Purpose of the samples' random draws; part of their seeds.")
    seed: int = Field(description="The run's seed.")
    index: int = Field(ge=0, description="Index of the shard in its stage.")
    first_sample: int = Field(ge=0, description="Number of the shard's first sample.")
    num_samples: int = Field(ge=1, description="Number of samples, numbered consecutively.")
    format: Literal["png", "npy"] = Field(default="png", description="File format of the images.")

    @property
    def numbers(self) -> range:
        """Sample numbers of the shard, in order."""
        return range(self.first_sample, self.first_sample + self.num_samples)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify this order in the shard's entry."""
        return fingerprint(self)


class ShardPlan(StrictModel):
    """Plan of a stage: all its shards and their reading order."""

    stage: str = Field(description="Name of the stage.")
    fingerprint: str = Field(
        description="Fingerprint of everything that determines the bytes: generator, seeds, ..."
    )
    purpose: str = Field(description="Purpose of the samples' random draws; part of their seeds.")
    seed: int = Field(description="The run's seed, for the samples and the reading order.")
    num_samples: int = Field(ge=1, description="Number of samples in the stage.")
    samples_per_shard: int = Field(
        ge=1, description="Number of samples per shard; the last shard may be smaller."
    )
    lanes: int = Field(ge=1, description="Fixed sequences of shards that are divided among ranks.")
    window: int = Field(
        ge=1, description="Number of consecutive shards of a lane that are shuffled together."
    )
    format: Literal["png", "npy"] = Field(default="png", description="File format of the images.")
    first_sample: int = Field(default=0, ge=0, description="Number of the stage's first sample.")

    @property
    def num_shards(self) -> int:
        """Number of shards in the stage."""
        return -(-self.num_samples // self.samples_per_shard)

    def shard_size(self, index: int) -> int:
        """Returns the number of samples in shard `index`."""
        return min(self.samples_per_shard, self.num_samples - index * self.samples_per_shard)

    def order(self, index: int) -> ShardOrder:
        """Returns the order of shard `index`.

        Raises:
            ValueError: the index is out of range.
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
    """Returns the orders of all shards of a stage, by index."""
    return map(plan.order, range(plan.num_shards))


def rank_lanes(lanes: int, rank: int, world_size: int) -> range:
    """Returns the lanes that rank `rank` of `world_size` reads."""
    return range(rank * lanes // world_size, (rank + 1) * lanes // world_size)


def check_sizes(plan: ShardPlan, *, batch_size: int, world_size: int) -> None:
    """Checks that the lanes of a plan can be divided among ranks and batches.

    Raises:
        ConfigError: they cannot; the message names the nearest valid sizes below and above.
    """
    lanes, shards = plan.lanes, plan.num_shards
    if batch_size < 1 or world_size < 1:
        raise ConfigError(
            f"expected batch_size and world_size >= 1, got {batch_size} and {world_size}"
        )
    if lanes > shards:
        raise ConfigError(f"stage {plan.stage!r}: {lanes} lanes but {_shard_advice(plan)}")
    if lanes % world_size:
        ranks = _nearest(world_size, (n for n in range(1, lanes + 1) if lanes % n == 0))
        others = _nearest(lanes, range(world_size, lanes + world_size + 1, world_size))
        raise ConfigError(
            f"stage {plan.stage!r}: {lanes} lanes cannot be divided among {world_size} ranks; "
            f"use {ranks} ranks, or {others} lanes"
        )
    if batch_size % lanes:
        sizes = _nearest(batch_size, range(lanes, batch_size + lanes + 1, lanes))
        raise ConfigError(
            f"stage {plan.stage!r}: a batch of {batch_size} cannot be divided evenly among {lanes} "
            f"lanes; use a batch of {sizes}"
        )


def _shard_advice(plan: ShardPlan) -> str:
    shards = f"only {plan.num_shards} shards; use at most {plan.num_shards} lanes"
    if plan.lanes > plan.num_samples:
        return f"{shards}, or at least {plan.lanes} samples"
    # ceil(M / S) >= L holds exactly for S <= (M - 1) / (L - 1).
    return f"{shards}, or at most {(plan.num_samples - 1) // (plan.lanes - 1)} samples per shard"


def _nearest(value: int, candidates: Iterable[int]) -> str:
    known = list(candidates)
    below = max((n for n in known if n < value), default=None)
    above = min((n for n in known if n > value), default=None)
    return " or ".join(str(n) for n in (below, above) if n is not None)


@dataclass(frozen=True)
class Window:
    """Consecutive shards of a lane in one epoch that are shuffled together.

    Attributes:
        start: position of its first sample on the infinite lane; `stop` is one past its last.
        shards: indices of its shards, in the lane's order of that epoch.
    """

    lane: int
    epoch: int
    index: int
    start: int
    stop: int
    shards: tuple[int, ...]


class DataOrder:
    """The samples of each global batch, computed without reading any data."""

    def __init__(self, plan: ShardPlan, *, seed: int | None = None) -> None:
        """Creates the order of `plan`; `seed` replaces the plan's seed for shuffling.

        Raises:
            ConfigError: the plan has more lanes than shards.
        """
        check_sizes(plan, batch_size=plan.lanes, world_size=1)
        self.plan = plan
        self.seed = plan.seed if seed is None else seed
        # Two per lane: a batch may span two windows or epochs.
        self._epoch = lru_cache(2 * plan.lanes)(self._permuted_lane)
        self._windows = lru_cache(2 * plan.lanes)(self._window)
        self._rows = lru_cache(2 * plan.lanes)(self._shuffled_window)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change if the samples or their order change."""
        return fingerprint({"plan": self.plan.model_dump(mode="json"), "seed": self.seed})

    def lane_length(self, lane: int) -> int:
        """Returns the number of samples in one epoch of a lane."""
        return self._num_shards(lane) * self.plan.samples_per_shard - self._deficit(lane)

    def _num_shards(self, lane: int) -> int:
        return (self.plan.num_shards - lane + self.plan.lanes - 1) // self.plan.lanes

    def _deficit(self, lane: int) -> int:
        """Returns the number of samples missing in the lane's shards: the last one may be short."""
        last = self.plan.num_shards - 1
        if last % self.plan.lanes != lane:
            return 0
        return self.plan.samples_per_shard - self.plan.shard_size(last)

    def _permuted_lane(self, lane: int, epoch: int) -> tuple[NDArray[np.int64], int]:
        """Returns the lane's shards in an epoch's order, and the window of the short shard."""
        shards = np.arange(lane, self.plan.num_shards, self.plan.lanes, dtype=np.int64)
        if epoch:
            shards = shards[_permutation(len(shards), self.seed, "lane order", epoch, lane)]
        if not self._deficit(lane):
            return shards, len(shards)
        position = int(np.flatnonzero(shards == self.plan.num_shards - 1)[0])
        return shards, position // self.plan.window

    def window_at(self, lane: int, position: int) -> Window:
        """Returns the window of sample `position` on the infinite lane, in constant time."""
        if position < 0 or not 0 <= lane < self.plan.lanes:
            raise ValueError(f"no position {position} on lane {lane} of {self.plan.lanes}")
        epoch, offset = divmod(position, self.lane_length(lane))
        full, deficit = self.plan.window * self.plan.samples_per_shard, self._deficit(lane)
        short = self._epoch(lane, epoch)[1]
        index = offset // full
        if index >= short:
            # Every window after the short one starts `deficit` samples earlier.
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
        """Yields the window at `position` and all following windows of the lane, infinitely."""
        while True:
            window = self.window_at(lane, position)
            yield window
            position = window.stop

    def window_rows(self, window: Window) -> NDArray[np.int64]:
        """Returns int64 [n, 2], read-only: shard and row of a window's samples in reading order."""
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
        """Returns the windows of samples [start, start + count) of a lane: (window, first, stop).

        `first` and `stop` are relative to the window's start.
        """
        parts, stop = [], start + count
        while start < stop:
            window = self.window_at(lane, start)
            end = min(stop, window.stop)
            parts.append((window, start - window.start, end - window.start))
            start = end
        return parts

    def lane_samples(self, lane: int, start: int, count: int) -> NDArray[np.int64]:
        """Returns int64 [count, 2]: shard and row of samples [start, start + count) of the lane."""
        parts = self.lane_windows(lane, start, count)
        pieces = [self.window_rows(window)[first:last] for window, first, last in parts]
        return np.concatenate(pieces) if pieces else np.empty((0, 2), np.int64)

    def batch(
        self, step: int, batch_size: int, *, lanes: Iterable[int] | None = None
    ) -> list[NDArray[np.int64]]:
        """Returns shard and row of the samples of global batch `step`, int64 [B / L, 2] per lane.

        Args:
            step: number of earlier global batches (the cursor).
            batch_size: size of the global batch.
            lanes: lanes to include, e.g. those of a rank; all by default.

        Raises:
            ConfigError: the batch cannot be divided among the lanes.
        """
        check_sizes(self.plan, batch_size=batch_size, world_size=1)
        share = batch_size // self.plan.lanes
        lanes = range(self.plan.lanes) if lanes is None else lanes
        return [self.lane_samples(lane, step * share, share) for lane in lanes]

    def batch_numbers(
        self, step: int, batch_size: int, *, lanes: Iterable[int] | None = None
    ) -> NDArray[np.int64]:
        """Returns int64 [b]: sample numbers of global batch `step`, lane by lane."""
        rows = np.concatenate(self.batch(step, batch_size, lanes=lanes))
        return self.plan.first_sample + rows[:, 0] * self.plan.samples_per_shard + rows[:, 1]

    def reach(self, batch_size: int) -> int:
        """Returns how many shards after `ShardStream.position` a batch needs.

        Generators that are throttled below this number deadlock with readers that wait. Twice as
        many avoid waiting at the end of every window.
        """
        check_sizes(self.plan, batch_size=batch_size, world_size=1)
        share, full = batch_size // self.plan.lanes, self.plan.window * self.plan.samples_per_shard
        return self.plan.lanes * self.plan.window * ((share - 1) // full + 2)

    def windows_needed(
        self, step: int, batch_size: int, *, lanes: Iterable[int] | None = None
    ) -> Iterator[Window]:
        """Yields windows in the order in which batches from `step` on open them, infinitely."""
        share = batch_size // self.plan.lanes
        lanes = range(self.plan.lanes) if lanes is None else lanes
        streams = [self.windows(lane, step * share) for lane in lanes]
        return heapq.merge(*streams, key=lambda window: window.start)


def _permutation(count: int, seed: int, purpose: str, *index: int) -> NDArray[np.int64]:
    words = np.random.PCG64(derive_seed(seed, purpose, *index)).random_raw(count)
    return np.argsort(words, kind="stable")
