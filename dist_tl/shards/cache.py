"""Shards kept near: decoded ones in memory, tars in a folder that the ranks of a node share.

Both are bounded, and both are only a shortcut: losing one costs time.
"""

import contextlib
import os
import secrets
import threading
from collections import OrderedDict
from pathlib import Path

from dist_tl.shards.reader import DecodedShard


class MemoryCache:
    """Decoded shards by index, the least recently used dropped first. Safe to share by threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._shards: OrderedDict[int, DecodedShard] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, index: int) -> DecodedShard | None:
        """The shard, if it is here."""
        with self._lock:
            shard = self._shards.get(index)
            if shard is not None:
                self._shards.move_to_end(index)
            return shard

    def put(self, index: int, shard: DecodedShard) -> None:
        """Keep the shard, dropping others to make room; one that is too large is not kept."""
        with self._lock:
            if index in self._shards or shard.nbytes > self._max_bytes:
                return
            self._shards[index] = shard
            self._bytes += shard.nbytes
            while self._bytes > self._max_bytes:
                _, dropped = self._shards.popitem(last=False)
                self._bytes -= dropped.nbytes


class DiskCache:
    """Tars by their hash in a local folder, the least recently used dropped first.

    Files appear whole or not at all, so processes may share the folder. What is read has to be
    compared with its hash by the caller, as if it came from the store. A full or failing disk is
    the same as no cache.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def get(self, sha256: str) -> bytes | None:
        """The tar of that hash, if it is here."""
        path = self._path(sha256)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, sha256: str, data: bytes) -> None:
        """Keep a tar, dropping others to make room; one that is too large is not kept."""
        if len(data) > self._max_bytes:
            return
        part = self._folder / f"{sha256}.{secrets.token_hex(4)}.part"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room(len(data))
            part.write_bytes(data)
            os.replace(part, self._path(sha256))
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()

    def drop(self, sha256: str) -> None:
        """Forget a tar, because it is damaged."""
        with contextlib.suppress(OSError):
            self._path(sha256).unlink()

    def _path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.tar"

    def _make_room(self, needed: int) -> None:
        files = []
        for path in self._folder.iterdir():
            # Another process may drop a file at any moment.
            with contextlib.suppress(OSError):
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in files) + needed - self._max_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
