"""An endless stream of batches from shards that may not exist yet.

What comes at step t is fixed by `order`; this file only fetches it in time. Shards are asked for by
index, and a shard that is not there is waited for, so training starts on the first shards while
later ones are still being made. State is one integer, the cursor: global batches consumed.
"""

import itertools
import time
from collections.abc import Generator
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_tl.errors import ConfigError, ShardError, ShardTimeoutError, StorageError
from dist_tl.shards.cache import DiskCache, MemoryCache
from dist_tl.shards.loader import LoadFigures, Prefetch, ShardLoader
from dist_tl.shards.manifest import committed_indices, read_entry
from dist_tl.shards.order import DataOrder, ShardPlan, Window, check_sizes, rank_lanes
from dist_tl.shards.reader import DecodedShard
from dist_tl.storage.objects import ObjectStore

_LOOK_EVERY_S = 0.2  # while waiting: whether the stream was closed meanwhile


@dataclass(frozen=True)
class StreamBatch:
    """One rank's part of a global batch, lane after lane.

    Attributes:
        numbers: int64 [b] sample numbers.
        images: uint8 [b, H, W, C]; `sample.dequantise` makes floats of them.
        labels: int64 [b] source classes, or None.
        soft: float32 [b, K] soft labels, or None.
        lanes: the rows of each of the rank's lanes.
    """

    numbers: NDArray[np.int64]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    soft: NDArray[np.float32] | None
    lanes: tuple[slice, ...]


@dataclass(frozen=True)
class StreamFigures:
    """What a stream did since it was made. Seconds are wall-clock."""

    batches: int
    seconds_starved: float  # spent by the consumer waiting for shards
    first_batch_s: float | None  # from the start of the first reading to its first batch
    shards_read: int  # fetched from the store
    bytes_read: int
    memory_hits: int
    disk_hits: int


class ShardStream:
    """One rank's batches of a stage, from any cursor on.

    Args:
        store: the run's store.
        plan: the stage's shards and how they are read.
        batch_size: size of the global batch, over all ranks.
        rank: this reader's number among `world_size`.
        timeout_s: how long the consumer may wait for one shard.
        prefetch_shards: shards to load ahead of the windows being read.
        decode_threads: threads that fetch and decode.
        memory_bytes: decoded shards to keep for later epochs.
        cache_folder: a local folder to keep tars in, shared by the ranks of a node.
        cache_bytes: the most that folder may hold.
        seed: shuffles in place of the plan's seed.
        poll_s: first and longest pause between two looks for a shard that is not there.

    Raises:
        ConfigError: lanes, ranks and batch do not fit; names the nearest sizes that do.
    """

    def __init__(
        self,
        store: ObjectStore,
        plan: ShardPlan,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        timeout_s: float = 600.0,
        prefetch_shards: int = 4,
        decode_threads: int = 4,
        memory_bytes: int = 1 << 29,
        cache_folder: Path | None = None,
        cache_bytes: int = 1 << 34,
        seed: int | None = None,
        poll_s: tuple[float, float] = (0.02, 0.5),
    ) -> None:
        check_sizes(plan, batch_size=batch_size, world_size=world_size)
        if not 0 <= rank < world_size or min(prefetch_shards, decode_threads) < 1:
            raise ConfigError(
                f"expected a rank in 0..{world_size - 1}, and at least one prefetched shard and "
                f"thread; got {rank}, {prefetch_shards} and {decode_threads}"
            )
        self.order = DataOrder(plan, seed=seed)
        self.lanes = rank_lanes(plan.lanes, rank, world_size)
        self.batch_size = batch_size
        self._store, self._plan = store, plan
        self._share = batch_size // plan.lanes  # samples that a batch takes from one lane
        self._timeout_s, self._poll_s = timeout_s, poll_s
        self._prefetch_shards, self._threads = prefetch_shards, decode_threads
        self._memory = MemoryCache(memory_bytes)
        self._disk = DiskCache(Path(cache_folder), cache_bytes) if cache_folder else None
        self._readings: list[_Reading] = []
        self._cursor = 0

    def read_from(self, cursor: int) -> Generator[tuple[StreamBatch, int], None, None]:
        """Batches from global batch `cursor` on, without end, each with the cursor after it.

        Starts at once, wherever the cursor is: nothing before it is read.

        Raises:
            ShardTimeoutError: a shard was not there in time; names it and how many are.
            ShardError: a shard is damaged or belongs to another job; names it and the remedy.
            StorageError: the store cannot be read.
        """
        if cursor < 0:
            raise ValueError(f"expected a cursor >= 0, got {cursor}")
        self._cursor = cursor
        reading = _Reading(self, cursor)
        self._readings.append(reading)
        try:
            for step in itertools.count(cursor):
                batch = reading.batch(step)
                self._cursor = step + 1
                yield batch, step + 1
        except CancelledError:
            return  # closed while waiting
        finally:
            reading.close()
            reading.let_go()

    def close(self) -> None:
        """Stop all readings and their threads; a consumer that waits is released."""
        for reading in self._readings:
            reading.close()

    @property
    def position(self) -> int:
        """The lowest shard that epoch 0 has not finished with; the number of shards when it has.

        Generators that are held back must be let make at least `order.reach(batch_size)` shards
        from here on.
        """
        at, lowest = self._cursor * self._share, self._plan.num_shards
        for lane in self.lanes:
            if at < self.order.lane_length(lane):
                lowest = min(lowest, self.order.window_at(lane, at).shards[0])
        return lowest

    @property
    def figures(self) -> StreamFigures:
        """What the stream did so far, over all its readings."""
        loads = [reading.loader.figures for reading in self._readings]
        totals = {name: sum(getattr(load, name) for load in loads) for name in vars(LoadFigures())}
        return StreamFigures(
            batches=sum(reading.batches for reading in self._readings),
            seconds_starved=sum(reading.seconds_starved for reading in self._readings),
            first_batch_s=self._readings[0].first_batch_s if self._readings else None,
            **totals,
        )


class _Take(NamedTuple):
    shard: DecodedShard
    places: NDArray[np.int64]  # rows of the batch
    rows: NDArray[np.int64]  # rows of the shard that go there


class _Reading:
    """One pass over the stream: its threads, and the windows that are open."""

    def __init__(self, stream: ShardStream, cursor: int) -> None:
        self._stream = stream
        self._order, self._plan = stream.order, stream._plan
        self.loader = ShardLoader(
            stream._store,
            stream._plan,
            threads=stream._threads,
            memory=stream._memory,
            disk=stream._disk,
            poll_s=stream._poll_s,
        )
        windows = self._order.windows_needed(cursor, stream.batch_size, lanes=stream.lanes)
        self._prefetch = Prefetch(windows, self.loader.request, limit=stream._prefetch_shards)
        self._open: dict[Window, dict[int, Future[DecodedShard]]] = {}
        self._started = time.monotonic()
        self.batches, self.seconds_starved = 0, 0.0
        self.first_batch_s: float | None = None

    def close(self) -> None:
        """Stop the threads; whoever waits for them gets CancelledError."""
        self.loader.close()

    def let_go(self) -> None:
        """Forget all shards. Only for the consumer's own thread: it may be using them."""
        self._open.clear()
        self._prefetch.clear()

    def batch(self, step: int) -> StreamBatch:
        """The rank's part of global batch `step`; steps must not go back."""
        share, lanes = self._stream._share, self._stream.lanes
        parts = [self._order.lane_windows(lane, step * share, share) for lane in lanes]
        self._open_windows([window for part in parts for window, _, _ in part], step * share)
        takes, row = [], 0
        for window, first, last in itertools.chain.from_iterable(parts):
            takes += self._takes(window, first, last, row)
            row += last - first
        slices = tuple(slice(i * share, (i + 1) * share) for i in range(len(lanes)))
        batch = _gather(takes, row, slices)
        if self.first_batch_s is None:
            self.first_batch_s = time.monotonic() - self._started
        self.batches += 1
        return batch

    def _open_windows(self, windows: list[Window], done: int) -> None:
        """Ask for the shards of all windows before waiting for any, and let go of those read."""
        for window in [window for window in self._open if window.stop <= done]:
            del self._open[window]
        for window in windows:
            if window not in self._open:
                self._open[window] = self._prefetch.open(window)
        self._prefetch.top_up()

    def _takes(self, window: Window, first: int, last: int, row: int) -> list[_Take]:
        """What to copy for samples [first, last) of a window, into the batch from `row` on."""
        rows = self._order.window_rows(window)[first:last]
        takes = []
        for index in np.unique(rows[:, 0]).tolist():
            places = np.flatnonzero(rows[:, 0] == index)
            takes.append(_Take(self._shard(window, index), places + row, rows[places, 1]))
        return takes

    def _shard(self, window: Window, index: int) -> DecodedShard:
        future = self._open[window][index]
        if not future.done():
            started = time.monotonic()
            try:
                self._wait(future, index)
            finally:
                self.seconds_starved += time.monotonic() - started
        return future.result()

    def _wait(self, future: Future[DecodedShard], index: int) -> None:
        deadline = time.monotonic() + self._stream._timeout_s
        while not future.done():
            if self.loader.is_closed:
                raise CancelledError
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise ShardTimeoutError(self._explain(index))
            wait([future], timeout=min(remaining, _LOOK_EVERY_S))

    def _explain(self, index: int) -> str:
        stage, waited = self._plan.stage, f"within {self._stream._timeout_s:g} s"
        try:
            committed = len(committed_indices(self._stream._store, stage))
            is_committed = read_entry(self._stream._store, stage, index) is not None
        except (StorageError, ShardError) as error:
            return f"shard {index} of stage {stage!r} could not be read {waited}: {error}"
        if is_committed:
            return (
                f"shard {index} of stage {stage!r} is committed but could not be fetched {waited}; "
                f"check the connection to the store, or raise the timeout"
            )
        return (
            f"shard {index} of stage {stage!r} was not committed {waited} "
            f"({committed} of {self._plan.num_shards} shards are); check the generators, or raise "
            f"the timeout"
        )


def _gather(takes: list[_Take], size: int, lanes: tuple[slice, ...]) -> StreamBatch:
    columns: dict[str, NDArray | None] = {}
    for name in ("numbers", "images", "labels", "soft"):
        like = getattr(takes[0].shard, name)
        columns[name] = None if like is None else np.empty((size, *like.shape[1:]), like.dtype)
        for take in takes:
            source = getattr(take.shard, name)
            if (source is None) != (like is None) or np.shape(source)[1:] != np.shape(like)[1:]:
                raise ShardError(f"shards of one stage differ in {name}; delete the stage")
            if source is not None:
                columns[name][take.places] = source[take.rows]
    return StreamBatch(**columns, lanes=lanes)
