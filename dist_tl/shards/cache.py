"""Caches: decoded shards in memory, and tars in a folder that the ranks of a node share.

Both are bounded and only save time: a cache miss reads the store.
"""

import contextlib
import os
import secrets
import threading
from collections import OrderedDict
from pathlib import Path

from dist_tl.shards.reader import DecodedShard


class MemoryCache:
    """LRU cache of decoded shards by index. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._shards: OrderedDict[int, DecodedShard] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, index: int) -> DecodedShard | None:
        """Returns the shard, or None if it is not cached."""
        with self._lock:
            shard = self._shards.get(index)
            if shard is not None:
                self._shards.move_to_end(index)
            return shard

    def put(self, index: int, shard: DecodedShard) -> None:
        """Caches the shard and evicts others if needed; skips shards above the size limit."""
        with self._lock:
            if index in self._shards or shard.nbytes > self._max_bytes:
                return
            self._shards[index] = shard
            self._bytes += shard.nbytes
            while self._bytes > self._max_bytes:
                _, evicted = self._shards.popitem(last=False)
                self._bytes -= evicted.nbytes


class DiskCache:
    """LRU cache of tars by hash in a local folder.

    Files are written atomically, so that processes can share the folder. Callers must verify the
    hash of the data, like that of data from the store. A full or failing disk acts as an empty
    cache.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def get(self, sha256: str) -> bytes | None:
        """Returns the tar with this hash, or None if it is not cached."""
        path = self._path(sha256)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, sha256: str, data: bytes) -> None:
        """Caches a tar and evicts others if needed; skips tars above the size limit."""
        if len(data) > self._max_bytes:
            return
        temporary = self._folder / f"{sha256}.{secrets.token_hex(4)}.part"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room(len(data))
            temporary.write_bytes(data)
            os.replace(temporary, self._path(sha256))
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def drop(self, sha256: str) -> None:
        """Deletes a tar, e.g. a damaged one."""
        with contextlib.suppress(OSError):
            self._path(sha256).unlink()

    def _path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.tar"

    def _make_room(self, needed: int) -> None:
        files = []
        for path in self._folder.iterdir():
            # Another process may delete a file at any time.
            with contextlib.suppress(OSError):
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in files) + needed - self._max_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
