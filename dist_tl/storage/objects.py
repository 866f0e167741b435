"""One class over every place that keeps our bytes: a folder, S3, memory, other fsspec stores.

Not covered: what the keys mean (`layout.py`) and how each kind of place does it (`local.py`,
`remote.py`).
"""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from dist_tl.errors import ConfigError, StorageError
from dist_tl.storage.local import TEMPORARY_PREFIXES, LocalFolder
from dist_tl.storage.remote import RemoteFolder, error_code
from dist_tl.telemetry import redact

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]*)://(.*)", re.DOTALL)
_NOT_IN_KEYS = re.compile(r"[\\*?\[\]#\x00-\x1f\x7f]")
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@dataclass(frozen=True)
class StoreProbe:
    """What a store can do, found by trying.

    Attributes:
        writable: an object was written, read back and deleted.
        create_only: a second create-only write of the same key was refused by the store itself.
        note: one line for the user; empty when there is nothing to say.
    """

    writable: bool
    create_only: bool
    note: str


class ArrowPlace(NamedTuple):
    """A folder of a pyarrow file system; None stands for the local one."""

    filesystem: Any
    path: str


class ObjectStore:
    """A folder of objects, at any fsspec URL. Safe to share between threads, and picklable.

    A write is whole or absent, for readers and after a crash. Keys are relative paths with "/";
    prefixes name folders: "models/a" covers "models/a/x" but not "models/ab".

    Args:
        url: a path, "file://...", "s3://bucket/folder", "memory://name", ... Credentials come from
            the environment of the process that uses the store.

    Raises:
        ConfigError: the URL carries a login, has no bucket, or is of an unknown kind.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        protocol, root = _parse(os.fspath(url))
        is_local = protocol == "file"
        self._folder = LocalFolder(Path(root)) if is_local else RemoteFolder(protocol, root)
        self.url = root if is_local else f"{protocol}://{root}"

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    def child(self, prefix: str) -> "ObjectStore":
        """The store below a folder of this one."""
        return ObjectStore(self._address(_checked(prefix)))

    def for_arrow(self) -> "ArrowPlace":
        """This store as libraries built on Arrow take it.

        Where it is remote, the file system holds no credentials: each process takes its own from
        its environment.
        """
        if isinstance(self._folder, LocalFolder):
            return ArrowPlace(None, os.path.abspath(self.url))
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        filesystem = PyFileSystem(FSSpecHandler(self._folder.filesystem()))
        return ArrowPlace(filesystem, self.url.split("://", 1)[1])

    def read(self, key: str) -> bytes:
        """An object's bytes.

        Raises:
            StorageError: there is no such object, or the store cannot be read.
        """
        data = self.read_or_none(key)
        if data is None:
            raise self._missing(key)
        return data

    def read_or_none(self, key: str) -> bytes | None:
        """An object's bytes, or None where there is no such object; one request.

        Raises:
            StorageError: the store, or its bucket, cannot be read.
        """
        _checked(key)
        with self._explained("read", key):
            return self._folder.read(key)

    def write(self, key: str, data: bytes, *, create_only: bool = False) -> bool:
        """Put an object.

        Args:
            create_only: leave an object alone that is already there. Of several racing writers
                exactly one wins where the store can do that (see `probe`); elsewhere the last
                one does, so compare contents where it matters.

        Returns:
            True when these bytes were put; False when `create_only` and the key was taken, which
            after a broken connection may have been by this very call.

        Raises:
            StorageError: the store cannot be written.
        """
        _checked(key)
        with self._explained("write", key):
            # Stores that ignore the condition still refuse a key that was taken long ago.
            if create_only and self._folder.size(key) is not None:
                return False
            return self._folder.write(key, data, create_only=create_only)

    def exists(self, key: str) -> bool:
        """Whether there is an object under exactly this key."""
        _checked(key)
        with self._explained("look up", key):
            return self._folder.size(key) is not None

    def size(self, key: str) -> int:
        """An object's length in bytes.

        Raises:
            StorageError: there is no such object, or the store cannot be read.
        """
        _checked(key)
        with self._explained("look up", key):
            size = self._folder.size(key)
        if size is None:
            raise self._missing(key)
        return size

    def list(self, prefix: str = "") -> list[str]:
        """Every key below the folder `prefix`, sorted, relative to the store; [] if none."""
        folder = prefix.rstrip("/")
        if folder:
            _checked(folder)
        with self._explained("list", folder):
            keys = sorted(self._folder.keys(folder))
        return [key for key in keys if not _is_temporary(key)]

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""
        _checked(key)
        with self._explained("delete", key):
            self._folder.delete(key)

    def delete_all(self, prefix: str) -> None:
        """Remove every object below the folder `prefix`, in no particular order."""
        folder = _checked(prefix.rstrip("/"))
        with self._explained("delete", folder):
            self._folder.delete_all(folder)

    def put_file(self, local: Path, key: str) -> None:
        """Put the contents of a file, without holding a large one in memory."""
        _checked(key)
        with self._explained("upload a file to", key):
            self._folder.put_file(Path(local), key)

    def get_file(self, key: str, local: Path) -> None:
        """Save an object as a file, which appears whole or not at all; makes its folder."""
        _checked(key)
        local = Path(local)
        local.parent.mkdir(parents=True, exist_ok=True)
        part = local.parent / f"{TEMPORARY_PREFIXES[0]}{secrets.token_hex(8)}"
        try:
            with self._explained("download", key):
                self._folder.get_file(key, part)
            os.replace(part, local)
        finally:
            part.unlink(missing_ok=True)

    def read_json(self, key: str) -> Any:
        """The value of an object that holds JSON.

        Raises:
            StorageError: there is no such object, it is not JSON, or the store cannot be read.
        """
        try:
            return json.loads(self.read(key))
        except ValueError as error:
            raise StorageError(
                f"{self._address(key)} is not JSON ({error}); it is damaged or not ours: restore "
                "it, or delete it and run again"
            ) from None

    def write_json(self, key: str, value: Any, *, create_only: bool = False) -> bool:
        """Put a value as JSON; returns what `write` returns.

        Raises:
            ValueError: the value holds NaN or infinity, which JSON has no words for.
            StorageError: the store cannot be written.
        """
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        return self.write(key, text.encode() + b"\n", create_only=create_only)

    def probe(self) -> StoreProbe:
        """Try the store: write, read back, refuse a second create-only write, delete.

        Raises:
            StorageError: the store refuses one of them, is unreachable, or has no such bucket.
        """
        key, data = f".probe/{secrets.token_hex(8)}", secrets.token_bytes(16)
        with self._explained("write", key):
            self._folder.write(key, data, create_only=True)
        try:
            if self.read(key) != data:
                raise StorageError(
                    f"{self._address(key)} holds other bytes than were just written to it; this "
                    "store cannot be used"
                )
            with self._explained("write", key):
                refused = not self._folder.write(key, data, create_only=True)
        finally:
            self.delete(key)
        return StoreProbe(writable=True, create_only=refused, note="" if refused else _NO_CREATE)

    def _address(self, key: str) -> str:
        return f"{self.url.rstrip('/')}/{key}" if not self.url.endswith("://") else self.url + key

    def _missing(self, key: str) -> StorageError:
        return StorageError(
            f"there is no object {self._address(key)}; check the address, and that whatever "
            "writes it has finished"
        )

    @contextlib.contextmanager
    def _explained(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # No chain: what the libraries raise may quote requests and logins.
            raise StorageError(self._explain(action, key, error)) from None

    def _explain(self, action: str, key: str, error: Exception) -> str:
        name, text = error_code(error), str(error)
        reason = text if name in text else f"{name}: {text}"
        remedy = self._folder.remedy(error)
        return _without_secrets(f"cannot {action} {self._address(key)}: {reason}; {remedy}")


_NO_CREATE = (
    "this store does not refuse to overwrite (it ignores If-None-Match); of two writers of one "
    "key the last wins, and content hashes tell them apart"
)


def _parse(url: str) -> tuple[str, str]:
    """The kind of store, and where in it; an absolute path for a local one."""
    match = _URL.fullmatch(url)
    protocol, rest = (match[1].lower(), match[2]) if match else ("file", url)
    if match and _holds_login(rest):
        raise ConfigError(
            f"the {protocol}:// URL carries a login; leave it out and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY (or what this store uses) in the environment"
        )
    if protocol in {"file", "local"}:
        if not rest:
            raise ConfigError('expected a folder or a URL such as "s3://bucket/folder", got ""')
        return "file", os.path.abspath(os.path.expanduser(rest))
    if protocol not in fsspec.available_protocols():
        raise ConfigError(
            f"expected a path or a URL that starts with file://, s3:// or memory://, got {url!r}"
        )
    root = rest.strip("/")
    if not root and protocol != "memory":
        raise ConfigError(f'expected a bucket, as in "{protocol}://bucket/folder", got {url!r}')
    try:
        return protocol, _checked(root) if root else root
    except ValueError as error:
        raise ConfigError(f"{url!r} cannot be used: {error}") from None


def _holds_login(rest: str) -> bool:
    # A secret may hold a slash, so the part before "@" need not end where a host would.
    login, at, _ = rest.rpartition("@")
    return bool(at) and (":" in login or "/" not in login)


def _checked(key: str) -> str:
    """`key` itself, if every store can hold it.

    Raises:
        ValueError: it is absolute, has an empty, "." or ".." part, a character that some store
            gives a meaning, or a name that is reserved for uploads under way.
    """
    parts = key.split("/")
    if not all(parts) or "." in parts or ".." in parts:
        raise ValueError(f'expected a relative key such as "stages/a/job.json", got {key!r}')
    if found := _NOT_IN_KEYS.search(key):
        raise ValueError(f"expected a key without {found[0]!r}, got {key!r}")
    if _is_temporary(key):
        raise ValueError(f"names that start with {parts[-1][:5]!r} are reserved, got {key!r}")
    return key


def _is_temporary(key: str) -> bool:
    return key.rpartition("/")[2].startswith(TEMPORARY_PREFIXES)


def _without_secrets(text: str) -> str:
    for name in _SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return redact(text)
