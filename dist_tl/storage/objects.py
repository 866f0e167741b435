"""One class for all stores: a local folder, S3, memory and other fsspec file systems.

Not covered: the meaning of keys (`layout.py`) and the implementations of local and remote stores
(`local.py`, `remote.py`).
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
from dist_tl.storage import embedded
from dist_tl.storage.local import TEMPORARY_PREFIXES, LocalFolder
from dist_tl.storage.remote import RemoteFolder, error_code
from dist_tl.telemetry import redact

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]*)://(.*)", re.DOTALL)
_FORBIDDEN_IN_KEYS = re.compile(r"[\\*?\[\]#\x00-\x1f\x7f]")
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", embedded.SECRET)


@dataclass(frozen=True)
class StoreProbe:
    """Capabilities of a store, determined by trying them.

    Attributes:
        writable: an object was written, read back and deleted.
        create_only: the store itself rejected a second create-only write of the same key.
        note: one line for the user; empty if there is nothing to report.
    """

    writable: bool
    create_only: bool
    note: str


class ArrowLocation(NamedTuple):
    """A folder of a pyarrow file system; `filesystem` is None for local folders."""

    filesystem: Any
    path: str


class ObjectStore:
    """A folder of objects at any fsspec URL. Thread-safe and picklable.

    Writes are atomic, for readers and after a crash. Keys are relative paths with "/"; prefixes
    name folders: "models/a" covers "models/a/x" but not "models/ab".

    Args:
        url: a path, "file://...", "s3://bucket/folder", "memory://name", ... Credentials come from
            the environment of the process that uses the store.

    Raises:
        ConfigError: the URL contains credentials, has no bucket, or has an unknown scheme.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        protocol, root = _parse(os.fspath(url))
        is_local = protocol == "file"
        self._folder = LocalFolder(Path(root)) if is_local else RemoteFolder(protocol, root)
        self.url = root if is_local else f"{protocol}://{root}"

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    def child(self, prefix: str) -> "ObjectStore":
        """Returns the store for a folder of this one."""
        return ObjectStore(self._address(_check_key(prefix)))

    def for_arrow(self) -> "ArrowLocation":
        """Returns this store in the form that libraries built on Arrow accept.

        The file system of a remote store holds no credentials: each process reads them from its own
        environment.
        """
        if isinstance(self._folder, LocalFolder):
            return ArrowLocation(None, os.path.abspath(self.url))
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        filesystem = PyFileSystem(FSSpecHandler(self._folder.filesystem()))
        return ArrowLocation(filesystem, self.url.split("://", 1)[1])

    def read(self, key: str) -> bytes:
        """Returns an object's bytes.

        Raises:
            StorageError: there is no such object, or the store cannot be read.
        """
        data = self.read_or_none(key)
        if data is None:
            raise self._missing(key)
        return data

    def read_or_none(self, key: str) -> bytes | None:
        """Returns an object's bytes, or None if it does not exist; sends one request.

        Raises:
            StorageError: the store, or its bucket, cannot be read.
        """
        _check_key(key)
        with self._storage_errors("read", key):
            return self._folder.read(key)

    def write(self, key: str, data: bytes, *, create_only: bool = False) -> bool:
        """Writes an object.

        Args:
            create_only: do not overwrite an existing object. Of several concurrent writers exactly
                one wins if the store supports this (see `probe`); otherwise the last one wins, so
                compare the contents if it matters.

        Returns:
            True if these bytes were written; False if `create_only` and the key exists. After a
            broken connection it may exist because of this very call.

        Raises:
            StorageError: the store cannot be written.
        """
        _check_key(key)
        with self._storage_errors("write", key):
            # Stores that ignore the condition still reject keys that exist already.
            if create_only and self._folder.size(key) is not None:
                return False
            return self._folder.write(key, data, create_only=create_only)

    def exists(self, key: str) -> bool:
        """Returns whether an object exists under exactly this key."""
        _check_key(key)
        with self._storage_errors("look up", key):
            return self._folder.size(key) is not None

    def size(self, key: str) -> int:
        """Returns an object's size in bytes.

        Raises:
            StorageError: there is no such object, or the store cannot be read.
        """
        _check_key(key)
        with self._storage_errors("look up", key):
            size = self._folder.size(key)
        if size is None:
            raise self._missing(key)
        return size

    def list(self, prefix: str = "") -> list[str]:
        """Returns all keys below the folder `prefix`, sorted and relative to the store."""
        folder = prefix.rstrip("/")
        if folder:
            _check_key(folder)
        with self._storage_errors("list", folder):
            keys = sorted(self._folder.keys(folder))
        return [key for key in keys if not _is_temporary(key)]

    def delete(self, key: str) -> None:
        """Deletes an object. Does nothing if it does not exist."""
        _check_key(key)
        with self._storage_errors("delete", key):
            self._folder.delete(key)

    def delete_all(self, prefix: str) -> None:
        """Deletes all objects below the folder `prefix`, in no particular order."""
        folder = _check_key(prefix.rstrip("/"))
        with self._storage_errors("delete", folder):
            self._folder.delete_all(folder)

    def put_file(self, local: Path, key: str) -> None:
        """Uploads a file without loading a large one into memory."""
        _check_key(key)
        with self._storage_errors("upload a file to", key):
            self._folder.put_file(Path(local), key)

    def get_file(self, key: str, local: Path) -> None:
        """Downloads an object to a file atomically; creates the file's folder."""
        _check_key(key)
        local = Path(local)
        local.parent.mkdir(parents=True, exist_ok=True)
        temporary = local.parent / f"{TEMPORARY_PREFIXES[0]}{secrets.token_hex(8)}"
        try:
            with self._storage_errors("download", key):
                self._folder.get_file(key, temporary)
            os.replace(temporary, local)
        finally:
            temporary.unlink(missing_ok=True)

    def read_json(self, key: str) -> Any:
        """Returns the value of an object that holds JSON.

        Raises:
            StorageError: there is no such object, it is not JSON, or the store cannot be read.
        """
        try:
            return json.loads(self.read(key))
        except ValueError as error:
            raise StorageError(
                f"{self._address(key)} is not JSON ({error}); it is damaged or was not written by "
                "dist_tl: restore it, or delete it and run again"
            ) from None

    def write_json(self, key: str, value: Any, *, create_only: bool = False) -> bool:
        """Writes a value as JSON. Returns the result of :meth:`write`.

        Raises:
            ValueError: the value contains NaN or infinity, which JSON cannot represent.
            StorageError: the store cannot be written.
        """
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        return self.write(key, text.encode() + b"\n", create_only=create_only)

    def probe(self) -> StoreProbe:
        """Tests the store: write, read, a second create-only write (must be rejected), delete.

        Raises:
            StorageError: the store rejects a request, is unreachable, or the bucket does not exist.
        """
        key, data = f".probe/{secrets.token_hex(8)}", secrets.token_bytes(16)
        with self._storage_errors("write", key):
            self._folder.write(key, data, create_only=True)
        try:
            if self.read(key) != data:
                raise StorageError(
                    f"{self._address(key)} does not return the bytes that were just written; this "
                    "store cannot be used"
                )
            with self._storage_errors("write", key):
                create_only = not self._folder.write(key, data, create_only=True)
        finally:
            self.delete(key)
        note = "" if create_only else _NO_CREATE_ONLY
        return StoreProbe(writable=True, create_only=create_only, note=note)

    def _address(self, key: str) -> str:
        return f"{self.url.rstrip('/')}/{key}" if not self.url.endswith("://") else self.url + key

    def _missing(self, key: str) -> StorageError:
        return StorageError(
            f"there is no object {self._address(key)}; check the address, and that its writer has "
            "finished"
        )

    @contextlib.contextmanager
    def _storage_errors(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except StorageError as error:  # of the settings of the store, and complete
            raise StorageError(f"cannot {action} {self._address(key)}: {error}") from None
        except Exception as error:
            # Not chained: messages of the libraries may quote requests and credentials.
            raise StorageError(self._error_message(action, key, error)) from None

    def _error_message(self, action: str, key: str, error: Exception) -> str:
        name, text = error_code(error), str(error)
        reason = text if name in text else f"{name}: {text}"
        remedy = self._folder.remedy(error)
        return _redact_secrets(f"cannot {action} {self._address(key)}: {reason}; {remedy}")


_NO_CREATE_ONLY = (
    "this store does not support create-only writes (it ignores If-None-Match); if two writers "
    "write the same key, the last one wins, and content hashes reveal the difference"
)


def _parse(url: str) -> tuple[str, str]:
    """Returns the scheme and the path (absolute if local) of a URL."""
    match = _URL.fullmatch(url)
    protocol, rest = (match[1].lower(), match[2]) if match else ("file", url)
    if match and _has_login(rest):
        raise ConfigError(
            f"the {protocol}:// URL contains credentials; remove them and set AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY (or the equivalent of this store) in the environment"
        )
    if protocol in {"file", "local"}:
        if not rest:
            raise ConfigError('expected a folder or a URL such as "s3://bucket/folder", got ""')
        return "file", os.path.abspath(os.path.expanduser(rest))
    if protocol not in (*fsspec.available_protocols(), embedded.PROTOCOL):
        raise ConfigError(
            f"expected a path or a URL that starts with file://, s3:// or memory://, got {url!r}"
        )
    root = rest.strip("/")
    if not root and protocol != "memory":
        raise ConfigError(f'expected a bucket, as in "{protocol}://bucket/folder", got {url!r}')
    try:
        return protocol, _check_key(root) if root else root
    except ValueError as error:
        raise ConfigError(f"{url!r} cannot be used: {error}") from None


def _has_login(rest: str) -> bool:
    # A secret may contain a slash, so the part before "@" is not limited to the host part.
    login, at, _ = rest.rpartition("@")
    return bool(at) and (":" in login or "/" not in login)


def _check_key(key: str) -> str:
    """Returns `key` if it is valid in all stores.

    Raises:
        ValueError: it is absolute, has an empty, "." or ".." part, a character with a special
            meaning in some store, or a name that is reserved for temporary files.
    """
    parts = key.split("/")
    if not all(parts) or "." in parts or ".." in parts:
        raise ValueError(f'expected a relative key such as "stages/a/job.json", got {key!r}')
    if forbidden := _FORBIDDEN_IN_KEYS.search(key):
        raise ValueError(f"expected a key without {forbidden[0]!r}, got {key!r}")
    if _is_temporary(key):
        raise ValueError(f"names that start with {parts[-1][:5]!r} are reserved, got {key!r}")
    return key


def _is_temporary(key: str) -> bool:
    return key.rpartition("/")[2].startswith(TEMPORARY_PREFIXES)


def _redact_secrets(text: str) -> str:
    for name in _SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return redact(text)
