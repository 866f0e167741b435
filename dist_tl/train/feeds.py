"""Builds training batches from rows: the images of each rank and step, and their views.

A global batch is divided into lanes; rank r of R holds lanes r*L/R up to (r+1)*L/R. Every random
draw belongs to a lane, never to a rank, so images and views of a step do not depend on the number
of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dist_tl.datasets.images import LabelledImages, to_float
from dist_tl.datasets.views import Views
from dist_tl.errors import ConfigError
from dist_tl.seeds import numpy_rng, torch_rng
from dist_tl.shards.stream import ShardStream


@dataclass(frozen=True)
class LaneRows:
    """The rows of one lane at one step.

    Attributes:
        images: uint8 (b, height, width, channels), or float32 for rows that are not pictures.
        labels: int64 (b,), or None for unlabelled rows.
        numbers: int64 (b,) sample numbers, for messages and audits.
    """

    lane: int
    images: np.ndarray
    labels: np.ndarray | None
    numbers: np.ndarray


class Rows(Protocol):
    """An infinite sequence of steps; each holds the rows of this rank's lanes."""

    def read_from(self, cursor: int) -> Iterator[list[LaneRows]]:
        """Yields the steps from `cursor` on."""
        ...

    @property
    def seconds_starved(self) -> float:
        """Seconds spent waiting for rows that did not exist yet."""
        ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch of complete lanes, on the device. Images are float32 in [-1, 1].

    Attributes:
        images: (B, C, H, W) labelled images.
        labels: (B,) int64.
        weak, strong: (U, C, H, W) views of unlabelled rows, or None.
        numbers: sample numbers of the unlabelled rows.
        lanes: the lanes in this micro-batch; B is divided evenly among them.
    """

    images: Tensor
    labels: Tensor
    weak: Tensor | None
    strong: Tensor | None
    numbers: tuple[int, ...]
    lanes: tuple[int, ...]


def own_lanes(num_lanes: int, rank: int, world_size: int) -> range:
    """Returns the lanes of one rank.

    Raises:
        ConfigError: the lanes cannot be divided among `world_size` workers.
    """
    if num_lanes % world_size:
        divisors = [n for n in range(1, num_lanes + 1) if num_lanes % n == 0]
        next_lanes = world_size * (num_lanes // world_size + 1)
        raise ConfigError(
            f"{num_lanes} lanes cannot be divided among {world_size} workers; "
            f"use trainers.workers in {divisors}, or lanes={next_lanes}"
        )
    width = num_lanes // world_size
    return range(rank * width, (rank + 1) * width)


class MemoryRows:
    """Rows of a small data set in memory; every epoch is a new seeded permutation."""

    seconds_starved = 0.0

    def __init__(
        self,
        data: LabelledImages,
        *,
        batch_size: int,
        num_lanes: int,
        lanes: range,
        seed: int,
        purpose: str = "labelled order",
    ) -> None:
        if len(data.labels) == 0:
            raise ConfigError("expected at least one training image, got none")
        if batch_size < 1 or batch_size % num_lanes:
            low = batch_size - batch_size % num_lanes
            nearest = " or ".join(str(n) for n in (low, low + num_lanes) if n > 0)
            raise ConfigError(
                f"a batch of {batch_size} cannot be divided among {num_lanes} lanes; use a batch "
                f"of {nearest}"
            )
        self._data, self._lanes = data, lanes
        self._seed, self._purpose = seed, purpose
        self._batch_size, self._rows_per_lane = batch_size, batch_size // num_lanes
        self._orders: dict[int, np.ndarray] = {}

    def read_from(self, cursor: int) -> Iterator[list[LaneRows]]:
        while True:
            yield [self._lane(cursor, lane) for lane in self._lanes]
            cursor += 1

    def _lane(self, step: int, lane: int) -> LaneRows:
        start = step * self._batch_size + lane * self._rows_per_lane
        positions = range(start, start + self._rows_per_lane)
        rows = np.array([self._row(position) for position in positions], dtype=np.int64)
        return LaneRows(lane, self._data.images[rows], self._data.labels[rows], rows)

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._data.labels))
        if epoch not in self._orders:
            # A batch spans at most two epochs, unless it is larger than the data.
            for finished in [e for e in self._orders if e < epoch - 1]:
                del self._orders[finished]
            rng = numpy_rng(self._seed, self._purpose, epoch)
            self._orders[epoch] = rng.permutation(len(self._data.labels))
        return int(self._orders[epoch][offset])


class ShardRows:
    """Rows of a stage's shards, read while generators still produce them."""

    def __init__(self, stream: ShardStream) -> None:
        self._stream = stream

    @property
    def seconds_starved(self) -> float:
        return self._stream.figures.seconds_starved

    def read_from(self, cursor: int) -> Iterator[list[LaneRows]]:
        for batch, _ in self._stream.read_from(cursor):
            yield [
                LaneRows(
                    lane,
                    batch.images[rows],
                    None if batch.labels is None else batch.labels[rows],
                    batch.numbers[rows],
                )
                for lane, rows in zip(self._stream.lanes, batch.lanes, strict=True)
            ]


class Feed:
    """Batches for an objective, from labelled and optionally unlabelled rows.

    Args:
        labelled: rows with labels; shards in pseudo pre-training.
        unlabelled: rows without labels, of which each batch holds two views.
        accumulation: micro-batches per step; each holds complete lanes.
        seed: determines the views, together with step and lane.
    """

    def __init__(
        self,
        labelled: Rows,
        unlabelled: Rows | None,
        views: Views,
        *,
        accumulation: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._labelled, self._unlabelled, self._views = labelled, unlabelled, views
        self._accumulation, self._seed, self._device = accumulation, seed, device

    @property
    def seconds_starved(self) -> float:
        """Seconds spent waiting for shards, labelled and unlabelled."""
        waits = [rows.seconds_starved for rows in (self._labelled, self._unlabelled) if rows]
        return sum(waits)

    def read_from(self, cursor: int) -> Iterator[list[Batch]]:
        """Yields the micro-batches of each step from `cursor` on.

        Raises:
            ShardTimeoutError: a shard was not committed within the timeout of the stream.
        """
        labelled = self._labelled.read_from(cursor)
        unlabelled = self._unlabelled.read_from(cursor) if self._unlabelled else None
        step = cursor
        while True:
            labelled_lanes = next(labelled)
            unlabelled_lanes = next(unlabelled) if unlabelled else []
            parts = zip(self._parts(labelled_lanes), self._parts(unlabelled_lanes), strict=True)
            yield [self._batch(step, *part) for part in parts]
            step += 1

    def _parts(self, lanes: list[LaneRows]) -> list[list[LaneRows]]:
        if len(lanes) % self._accumulation:
            raise ConfigError(
                f"{len(lanes)} lanes per worker cannot be divided among {self._accumulation} "
                f"micro-batches; use lanes = workers * {self._accumulation}, or a multiple of it"
            )
        width = len(lanes) // self._accumulation
        return [lanes[i * width : (i + 1) * width] for i in range(self._accumulation)]

    def _batch(self, step: int, labelled: list[LaneRows], unlabelled: list[LaneRows]) -> Batch:
        labels = [rows.labels for rows in labelled if rows.labels is not None]
        if len(labels) < len(labelled):
            raise ConfigError("these shards hold no class labels; expected .cls in every sample")
        weak = strong = None
        numbers: list[int] = []
        if unlabelled:
            weak, strong = self._two_views(step, unlabelled)
            numbers = [int(n) for rows in unlabelled for n in rows.numbers]
        return Batch(
            images=torch.cat([self._labelled_view(step, rows) for rows in labelled]),
            labels=torch.from_numpy(np.concatenate(labels)).long().to(self._device),
            weak=weak,
            strong=strong,
            numbers=tuple(numbers),
            lanes=tuple(rows.lane for rows in labelled),
        )

    def _labelled_view(self, step: int, rows: LaneRows) -> Tensor:
        rng = torch_rng(self._seed, "labelled view", step, rows.lane)
        return self._views.weak(to_tensor(rows.images).to(self._device), rng)

    def _two_views(self, step: int, lanes: list[LaneRows]) -> tuple[Tensor, Tensor]:
        weak, strong = [], []
        for rows in lanes:
            images = to_tensor(rows.images).to(self._device)
            weak_rng = torch_rng(self._seed, "weak view", step, rows.lane)
            strong_rng = torch_rng(self._seed, "strong view", step, rows.lane)
            weak.append(self._views.weak(images, weak_rng))
            strong.append(self._views.strong(images, strong_rng))
        return torch.cat(weak), torch.cat(strong)


def to_tensor(images: np.ndarray) -> Tensor:
    """Converts stored rows (b, H, W, C) to network inputs, float32 (b, C, H, W)."""
    if images.dtype != np.float32:
        return to_float(images)
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
