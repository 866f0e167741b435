"""Threads that wait for shards, fetch and decode them, in the order they are asked for.

A thread waits for a shard as long as it takes: how long is too long is for the consumer to say,
who may itself be the slow one. Threads are daemons, so that a forgotten loader cannot keep a
process alive.
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
    """What a loader did: shards and bytes fetched from the store, shards found near."""

    shards_read: int = 0
    bytes_read: int = 0
    memory_hits: int = 0
    disk_hits: int = 0


class ShardLoader:
    """Decoded shards, asked for by index."""

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
        self._under_way: dict[int, Future[DecodedShard]] = {}
        self._figures = LoadFigures()
        self._threads = [
            threading.Thread(target=self._work, name=f"shards-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def figures(self) -> LoadFigures:
        """What was loaded so far."""
        return self._figures

    @property
    def is_closed(self) -> bool:
        """Whether nothing will be loaded any more."""
        return self._stop.is_set()

    def request(self, index: int) -> Future[DecodedShard]:
        """The shard, some time; its exception is a ShardError, StorageError or CancelledError."""
        with self._lock:
            future = self._under_way.get(index)
            if future is not None:
                return future
            future = Future()
            shard = self._memory.get(index)
            if shard is None:
                self._under_way[index] = future
        if shard is None:
            self._queue.put((index, future))
        else:
            self._count(memory_hits=1)
            future.set_result(shard)
        return future

    def close(self) -> None:
        """Stop the threads. A download under way is left to end by itself."""
        self._stop.set()
        for _ in self._threads:
            self._queue.put(None)
        deadline = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            index, future = task
            try:
                shard, error = self._load(index), None
            except BaseException as caught:
                # Everything goes to whoever waits: a thread has nobody else to tell.
                shard, error = None, caught
            with self._lock:
                del self._under_way[index]
            if error is None:
                future.set_result(shard)
            else:
                future.set_exception(error)

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
        near = self._disk.get(entry.sha256) if self._disk else None
        if near is not None:
            try:
                data = check_tar(near, self._plan.stage, entry)
            except ShardError:
                self._disk.drop(entry.sha256)
            else:
                self._count(disk_hits=1)
                return data
        data = fetch_tar(self._store, self._plan.stage, entry)
        self._count(shards_read=1, bytes_read=len(data))
        if self._disk:
            self._disk.put(entry.sha256, data)
        return data

    def _count(self, **more: int) -> None:
        with self._lock:
            values = {name: getattr(self._figures, name) + more[name] for name in more}
            self._figures = replace(self._figures, **values)


class Prefetch:
    """Windows of shards, loaded ahead of the moment they are opened.

    At most `limit` shards are asked for before their window is opened, in the order in which they
    will be needed; the shards of a window that is opened are asked for in any case.
    """

    def __init__(
        self,
        windows: Iterator[Window],
        request: Callable[[int], Future[DecodedShard]],
        *,
        limit: int,
    ) -> None:
        self._visits = ((window, shard) for window in windows for shard in window.shards)
        self._request = request
        self._limit = limit
        self._ahead: dict[tuple[int, int], dict[int, Future[DecodedShard]]] = {}
        self._num_ahead = 0

    def open(self, window: Window) -> dict[int, Future[DecodedShard]]:
        """The shards of a window by index, which no longer count as loaded ahead."""
        key = (window.lane, window.start)
        while len(self._ahead.get(key, ())) < len(window.shards):
            self._ask()
        shards = self._ahead.pop(key)
        self._num_ahead -= len(shards)
        return shards

    def clear(self) -> None:
        """Forget what was loaded ahead."""
        self._ahead.clear()

    def top_up(self) -> None:
        """Ask for shards until `limit` are on their way."""
        while self._num_ahead < self._limit:
            self._ask()

    def _ask(self) -> None:
        window, shard = next(self._visits)
        self._ahead.setdefault((window.lane, window.start), {})[shard] = self._request(shard)
        self._num_ahead += 1
