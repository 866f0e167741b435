"""From rows to training batches: which images a rank sees at a step, and through which views.

A global batch is cut into lanes; rank r of R holds lanes r*L/R up to (r+1)*L/R, and every draw
belongs to a lane, never to a rank. So the same images, in the same views, are seen at every step
whatever the number of ranks.
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
    """What one lane holds at one step.

    Attributes:
        images: uint8 (b, height, width, channels), or float32 where they are no pictures.
        labels: int64 (b,), or None for unlabelled rows.
        numbers: int64 (b,), which samples these are, for messages and audits.
    """

    lane: int
    images: np.ndarray
    labels: np.ndarray | None
    numbers: np.ndarray


class Rows(Protocol):
    """An endless sequence of steps; each gives the rows of this rank's lanes."""

    def read_from(self, cursor: int) -> Iterator[list[LaneRows]]:
        """The steps from `cursor` on."""

    @property
    def seconds_starved(self) -> float:
        """How long the reader has waited for rows that did not exist yet."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch: whole lanes, on the device. Images are float32 in [-1, 1].

    Attributes:
        images: (B, C, H, W), rows with labels.
        labels: (B,) int64.
        weak, strong: (U, C, H, W) views of unlabelled rows, or None.
        numbers: which samples the unlabelled rows are.
        lanes: the lanes in this micro-batch; B is split over them evenly.
    """

    images: Tensor
    labels: Tensor
    weak: Tensor | None
    strong: Tensor | None
    numbers: tuple[int, ...]
    lanes: tuple[int, ...]


def own_lanes(num_lanes: int, rank: int, world_size: int) -> range:
    """The lanes of one rank.

    Raises:
        ConfigError: the lanes cannot be shared evenly.
    """
    if num_lanes % world_size:
        fits = [n for n in range(1, num_lanes + 1) if num_lanes % n == 0]
        raise ConfigError(
            f"{num_lanes} lanes cannot be shared by {world_size} workers; "
            f"use trainers.workers in {fits}, or lanes={world_size * (num_lanes // world_size + 1)}"
        )
    width = num_lanes // world_size
    return range(rank * width, (rank + 1) * width)


class MemoryRows:
    """Rows of a small data set in memory, in seeded epochs of permutations without end."""

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
                f"{num_lanes} lanes cannot share a batch of {batch_size} evenly; use a batch of "
                f"{nearest}"
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
            # A batch touches two epochs at most, unless it is larger than the data.
            for old in [e for e in self._orders if e < epoch - 1]:
                del self._orders[old]
            rng = numpy_rng(self._seed, self._purpose, epoch)
            self._orders[epoch] = rng.permutation(len(self._data.labels))
        return int(self._orders[epoch][offset])


class ShardRows:
    """Rows of a stage's shards, read while they are being made."""

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
    """Batches for an objective: labelled rows, and unlabelled ones beside them if given.

    Args:
        labelled: rows whose labels are learnt; shards for pseudo pre-training.
        unlabelled: rows of which only views are seen.
        accumulation: micro-batches per step; each holds whole lanes.
        seed: fixes the views together with step and lane.
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
        """Seconds the trainer has waited for shards, over all its rows."""
        waits = [rows.seconds_starved for rows in (self._labelled, self._unlabelled) if rows]
        return sum(waits)

    def read_from(self, cursor: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step from `cursor` on.

        Raises:
            ShardTimeoutError: the generators fell further behind than the stream may wait.
        """
        labelled = self._labelled.read_from(cursor)
        unlabelled = self._unlabelled.read_from(cursor) if self._unlabelled else None
        step = cursor
        while True:
            real = next(labelled)
            pseudo = next(unlabelled) if unlabelled else []
            parts = zip(self._parts(real), self._parts(pseudo), strict=True)
            yield [self._batch(step, *part) for part in parts]
            step += 1

    def _parts(self, lanes: list[LaneRows]) -> list[list[LaneRows]]:
        if len(lanes) % self._accumulation:
            raise ConfigError(
                f"{len(lanes)} lanes a worker cannot be cut into {self._accumulation} "
                f"micro-batches; use lanes = workers * {self._accumulation}, or a multiple of it"
            )
        width = len(lanes) // self._accumulation
        return [lanes[i * width : (i + 1) * width] for i in range(self._accumulation)]

    def _batch(self, step: int, real: list[LaneRows], pseudo: list[LaneRows]) -> Batch:
        labels = [rows.labels for rows in real]
        if any(lane_labels is None for lane_labels in labels):
            raise ConfigError("these shards hold no class labels; expected .cls in every sample")
        weak = strong = None
        numbers: list[int] = []
        if pseudo:
            weak, strong = self._two_views(step, pseudo)
            numbers = [int(n) for rows in pseudo for n in rows.numbers]
        return Batch(
            images=torch.cat([self._labelled_view(step, rows) for rows in real]),
            labels=torch.from_numpy(np.concatenate(labels)).long().to(self._device),
            weak=weak,
            strong=strong,
            numbers=tuple(numbers),
            lanes=tuple(rows.lane for rows in real),
        )

    def _labelled_view(self, step: int, rows: LaneRows) -> Tensor:
        rng = torch_rng(self._seed, "labelled view", step, rows.lane)
        return self._views.weak(_tensor(rows.images).to(self._device), rng)

    def _two_views(self, step: int, lanes: list[LaneRows]) -> tuple[Tensor, Tensor]:
        weak, strong = [], []
        for rows in lanes:
            images = _tensor(rows.images).to(self._device)
            weak_rng = torch_rng(self._seed, "weak view", step, rows.lane)
            strong_rng = torch_rng(self._seed, "strong view", step, rows.lane)
            weak.append(self._views.weak(images, weak_rng))
            strong.append(self._views.strong(images, strong_rng))
        return torch.cat(weak), torch.cat(strong)


def _tensor(images: np.ndarray) -> Tensor:
    """Stored rows as networks see them, float32 (b, C, H, W)."""
    if images.dtype != np.float32:
        return to_float(images)
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
