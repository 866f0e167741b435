"""Threads that wait for shards, fetch and decode them, in the order of the requests.

A thread waits for a shard without a timeout: the consumer decides how long is too long, because
the consumer itself may be the slow part. Threads are daemons, so that an unclosed loader does not
keep the process alive.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace

from dist_tl.errors import ShardError
from dist_tl.shards.cache import DiskCache, MemoryCache
from dist_tl.shards.manifest import ShardEntry, check_entry, read_entry
from dist_tl.shards.order import ShardPlan, Window
from dist_tl.shards.reader import DecodedShard, check_tar, decode_shard, fetch_tar
from dist_tl.storage.objects import ObjectStore

_JOIN_S = 2.0


@dataclass(frozen=True)
class LoadFigures:
    """Counters of a loader: reads from the store and cache hits."""

    shards_read: int = 0
    bytes_read: int = 0
    memory_hits: int = 0
    disk_hits: int = 0


class ShardLoader:
    """Loads decoded shards by index."""

    def __init__(
        self,
        store: ObjectStore,
        plan: ShardPlan,
        *,
        threads: int,
        memory: MemoryCache,
        disk: DiskCache | None,
        poll_s: tuple[float, float],
    ) -> None:
        self._store, self._plan = store, plan
        self._memory, self._disk = memory, disk
        self._poll_s = poll_s
        self._queue: queue.SimpleQueue[tuple[int, Future[DecodedShard]] | None]
        self._queue = queue.SimpleQueue()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._in_flight: dict[int, Future[DecodedShard]] = {}
        self._figures = LoadFigures()
        self._threads = [
            threading.Thread(target=self._work, name=f"shards-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def figures(self) -> LoadFigures:
        """Counters since the loader was created."""
        return self._figures

    @property
    def is_closed(self) -> bool:
        """Whether the loader is closed."""
        return self._stop.is_set()

    def request(self, index: int) -> Future[DecodedShard]:
        """Requests a shard.

        Returns:
            A future of the shard. Its exception is a ShardError, StorageError or CancelledError.
        """
        with self._lock:
            future = self._in_flight.get(index)
            if future is not None:
                return future
            future = Future()
            shard = self._memory.get(index)
            if shard is None:
                self._in_flight[index] = future
        if shard is None:
            self._queue.put((index, future))
        else:
            self._count(memory_hits=1)
            future.set_result(shard)
        return future

    def close(self) -> None:
        """Stops the threads. Does not wait for downloads in progress."""
        self._stop.set()
        for _ in self._threads:
            self._queue.put(None)
        deadline = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            index, future = task
            result: DecodedShard | BaseException
            try:
                result = self._load(index)
            except BaseException as error:
                result = error  # the future passes it to the consumer
            with self._lock:
                del self._in_flight[index]
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _load(self, index: int) -> DecodedShard:
        entry = check_entry(self._wait_for_entry(index), self._plan)
        data = self._fetch(entry)
        numbers = self._plan.order(index).numbers
        shard = decode_shard(data, stage=self._plan.stage, index=index, numbers=numbers)
        self._memory.put(index, shard)
        return shard

    def _wait_for_entry(self, index: int) -> ShardEntry:
        pause_s, longest_s = self._poll_s
        while not self._stop.is_set():
            entry = read_entry(self._store, self._plan.stage, index)
            if entry is not None:
                return entry
            self._stop.wait(pause_s)
            pause_s = min(1.5 * pause_s, longest_s)
        raise CancelledError

    def _fetch(self, entry: ShardEntry) -> bytes:
        disk = self._disk
        cached = disk.get(entry.sha256) if disk else None
        if disk and cached is not None:
            try:
                data = check_tar(cached, self._plan.stage, entry)
            except ShardError:
                disk.drop(entry.sha256)
            else:
                self._count(disk_hits=1)
                return data
        data = fetch_tar(self._store, self._plan.stage, entry)
        self._count(shards_read=1, bytes_read=len(data))
        if disk:
            disk.put(entry.sha256, data)
        return data

    def _count(self, **increments: int) -> None:
        with self._lock:
            values = {name: getattr(self._figures, name) + n for name, n in increments.items()}
            self._figures = replace(self._figures, **values)


class Prefetch:
    """Loads windows of shards ahead of time.

    Requests at most `limit` shards before their window is opened, in the order in which they are
    needed. Opening a window requests all of its shards.
    """

    def __init__(
        self,
        windows: Iterator[Window],
        request: Callable[[int], Future[DecodedShard]],
        *,
        limit: int,
    ) -> None:
        self._upcoming = ((window, shard) for window in windows for shard in window.shards)
        self._request = request
        self._limit = limit
        self._ahead: dict[tuple[int, int], dict[int, Future[DecodedShard]]] = {}
        self._num_ahead = 0

    def open(self, window: Window) -> dict[int, Future[DecodedShard]]:
        """Returns the futures of a window's shards by index; they no longer count as prefetched."""
        key = (window.lane, window.start)
        while len(self._ahead.get(key, ())) < len(window.shards):
            self._request_next()
        shards = self._ahead.pop(key)
        self._num_ahead -= len(shards)
        return shards

    def clear(self) -> None:
        """Drops all prefetched shards."""
        self._ahead.clear()

    def top_up(self) -> None:
        """Requests shards until `limit` are prefetched."""
        while self._num_ahead < self._limit:
            self._request_next()

    def _request_next(self) -> None:
        window, shard = next(self._upcoming)
        self._ahead.setdefault((window.lane, window.start), {})[shard] = self._request(shard)
        self._num_ahead += 1
