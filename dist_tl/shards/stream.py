"""An infinite stream of batches from shards that may not exist yet.

`order` defines the batch at step t; this module only fetches it in time. Shards are requested by
index, and the stream waits for missing ones, so training starts on the first shards while later
ones are still being generated. The state is one integer, the cursor: global batches consumed.
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

_CLOSED_CHECK_S = 0.2  # while waiting: interval of checks for a closed stream


@dataclass(frozen=True)
class StreamBatch:
    """One rank's part of a global batch, lane by lane.

    Attributes:
        numbers: int64 [b] sample numbers.
        images: uint8 [b, H, W, C], see `sample.dequantise`; or float32 if not pictures.
        labels: int64 [b] source classes, or None.
        soft: float32 [b, K] soft labels, or None.
        lanes: rows of each lane of the rank.
    """

    numbers: NDArray[np.int64]
    images: NDArray[np.uint8] | NDArray[np.float32]
    labels: NDArray[np.int64] | None
    soft: NDArray[np.float32] | None
    lanes: tuple[slice, ...]


@dataclass(frozen=True)
class StreamFigures:
    """Counters of a stream since it was created. Seconds are wall-clock time."""

    batches: int
    seconds_starved: float  # consumer's time spent waiting for shards
    first_batch_s: float | None  # from the start of the first pass to its first batch
    shards_read: int  # fetched from the store
    bytes_read: int
    memory_hits: int
    disk_hits: int


class ShardStream:
    """One rank's batches of a stage, starting at any cursor.

    Args:
        store: the run's store.
        plan: plan of the stage: its shards and their reading order.
        batch_size: size of the global batch, over all ranks.
        rank: rank of this reader among `world_size`.
        timeout_s: maximum time that the consumer waits for one shard.
        prefetch_shards: number of shards to load ahead of the open windows.
        decode_threads: number of threads that fetch and decode.
        memory_bytes: size limit of the cache of decoded shards.
        cache_folder: local folder for a cache of tars, shared by the ranks of a node.
        cache_bytes: size limit of that folder.
        seed: replaces the plan's seed for shuffling.
        poll_s: first and longest interval between checks for a missing shard.

    Raises:
        ConfigError: lanes, ranks and batch size do not match; names the nearest valid sizes.
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
        self._share = batch_size // plan.lanes  # samples of a batch per lane
        self._timeout_s, self._poll_s = timeout_s, poll_s
        self._prefetch_shards, self._threads = prefetch_shards, decode_threads
        self._memory = MemoryCache(memory_bytes)
        self._disk = DiskCache(Path(cache_folder), cache_bytes) if cache_folder else None
        self._passes: list[_Pass] = []
        self._cursor = 0

    def read_from(self, cursor: int) -> Generator[tuple[StreamBatch, int], None, None]:
        """Yields batches from global batch `cursor` on, infinitely, each with the next cursor.

        Starts immediately at any cursor: earlier data is not read.

        Raises:
            ShardTimeoutError: a shard was not committed in time; names it and the number committed.
            ShardError: a shard is damaged or belongs to another job; names it and the remedy.
            StorageError: the store cannot be read.
        """
        if cursor < 0:
            raise ValueError(f"expected a cursor >= 0, got {cursor}")
        self._cursor = cursor
        current = _Pass(self, cursor)
        self._passes.append(current)
        try:
            for step in itertools.count(cursor):
                batch = current.batch(step)
                self._cursor = step + 1
                yield batch, step + 1
        except CancelledError:
            return  # closed while waiting
        finally:
            current.close()
            current.release()

    def close(self) -> None:
        """Stops all passes and their threads, and releases waiting consumers."""
        for one_pass in self._passes:
            one_pass.close()

    @property
    def position(self) -> int:
        """Lowest shard that epoch 0 still needs; the number of shards if epoch 0 is complete.

        Throttled generators must be allowed to make at least `order.reach(batch_size)` shards from
        here on.
        """
        offset, lowest = self._cursor * self._share, self._plan.num_shards
        for lane in self.lanes:
            if offset < self.order.lane_length(lane):
                lowest = min(lowest, self.order.window_at(lane, offset).shards[0])
        return lowest

    @property
    def figures(self) -> StreamFigures:
        """Counters over all passes."""
        loads = [one_pass.loader.figures for one_pass in self._passes]
        totals = {name: sum(getattr(load, name) for load in loads) for name in vars(LoadFigures())}
        return StreamFigures(
            batches=sum(one_pass.batches for one_pass in self._passes),
            seconds_starved=sum(one_pass.seconds_starved for one_pass in self._passes),
            first_batch_s=self._passes[0].first_batch_s if self._passes else None,
            **totals,
        )


class _Copy(NamedTuple):
    shard: DecodedShard
    batch_rows: NDArray[np.int64]  # destination
    shard_rows: NDArray[np.int64]  # source


class _Pass:
    """One pass over the stream, with its threads and open windows."""

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
        """Stops the threads; waiting consumers get CancelledError."""
        self.loader.close()

    def release(self) -> None:
        """Drops all shards. Call it from the consumer's thread only, which may be using them."""
        self._open.clear()
        self._prefetch.clear()

    def batch(self, step: int) -> StreamBatch:
        """Returns the rank's part of global batch `step`; steps must not decrease."""
        share, lanes = self._stream._share, self._stream.lanes
        parts = [self._order.lane_windows(lane, step * share, share) for lane in lanes]
        self._open_windows([window for part in parts for window, _, _ in part], step * share)
        copies, row = [], 0
        for window, first, last in itertools.chain.from_iterable(parts):
            copies += self._copies(window, first, last, row)
            row += last - first
        slices = tuple(slice(i * share, (i + 1) * share) for i in range(len(lanes)))
        batch = _gather(copies, row, slices)
        if self.first_batch_s is None:
            self.first_batch_s = time.monotonic() - self._started
        self.batches += 1
        return batch

    def _open_windows(self, windows: list[Window], done: int) -> None:
        """Requests the shards of all windows before waiting for any, and drops consumed windows."""
        for window in [window for window in self._open if window.stop <= done]:
            del self._open[window]
        for window in windows:
            if window not in self._open:
                self._open[window] = self._prefetch.open(window)
        self._prefetch.top_up()

    def _copies(self, window: Window, first: int, last: int, row: int) -> list[_Copy]:
        """Returns the copies of samples [first, last) of a window to the batch from `row` on."""
        rows = self._order.window_rows(window)[first:last]
        copies = []
        for index in np.unique(rows[:, 0]).tolist():
            of_shard = np.flatnonzero(rows[:, 0] == index)
            copies.append(_Copy(self._shard(window, index), of_shard + row, rows[of_shard, 1]))
        return copies

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
                raise ShardTimeoutError(self._timeout_message(index))
                wait([future], timeout=min(remaining, _CLOSED_CHECK_S))

    def _timeout_message(self, index: int) -> str:
        stage, waited = self._plan.stage, f"within {self._stream._timeout_s:g} s"
        try:
            committed = len(committed_indices(self._stream._store, stage))
            is_committed = read_entry(self._stream._store, stage, index) is not None
        except (StorageError, ShardError) as error:
            return f"shard {index} of stage {stage!r} could not be read {waited}: {error}"
        if is_committed:
            return (
                f"shard {index} of stage {stage!r} is committed but could not be fetched {waited}; "
                f"check the connection to the store, or increase the timeout"
            )
        return (
            f"shard {index} of stage {stage!r} was not committed {waited} "
            f"({committed} of {self._plan.num_shards} shards are); check the generators, or "
            f"increase the timeout"
        )


def _gather(copies: list[_Copy], size: int, lanes: tuple[slice, ...]) -> StreamBatch:
    numbers, images = _column(copies, "numbers", size), _column(copies, "images", size)
    assert numbers is not None
    assert images is not None
    labels, soft = _column(copies, "labels", size), _column(copies, "soft", size)
    return StreamBatch(numbers, images, labels, soft, lanes)


def _column(copies: list[_Copy], name: str, size: int) -> NDArray | None:
    sources: list[NDArray | None] = [getattr(copy.shard, name) for copy in copies]
    shapes = {None if source is None else source.shape[1:] for source in sources}
    if len(shapes) > 1:
        raise ShardError(f"shards of one stage differ in {name}; delete the stage")
    first = sources[0]
    if first is None:
        return None
    column = np.empty((size, *first.shape[1:]), first.dtype)
    for copy, source in zip(copies, sources, strict=True):
        assert source is not None
        column[copy.batch_rows] = source[copy.shard_rows]
    return column
