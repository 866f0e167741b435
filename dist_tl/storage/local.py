"""Objects as plain files: every write is atomic and survives a crash.

Not covered: validation of keys and error messages, which `objects.py` provides for all stores.
"""

import contextlib
import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Our own temporary files and those of uploads to the embedded S3 server (rclone). A killed process
# leaves them behind.
TEMPORARY_PREFIXES = (".tmp-", ".rclone_temp_", ".rclone_multipart_upload_")

# More than one object needs: a server removes the part that it wrote of an object, and then the
# disk is not quite full any more.
_ROOM_BYTES = 64 * 2**20

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class LocalFolder:
    """A folder on this machine, or on a file system that all machines share."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, key: str) -> bytes | None:
        """Returns the object's bytes, or None if it does not exist."""
        try:
            return (self._root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def write(self, key: str, data: bytes, *, create_only: bool) -> bool:
        """Writes an object. Returns False if `create_only` and the key exists."""

        def fill(temporary: Path) -> None:
            temporary.write_bytes(data)

        return self._publish(key, fill, create_only=create_only)

    def put_file(self, local: Path, key: str) -> None:
        """Copies a file into the folder."""

        def fill(temporary: Path) -> None:
            shutil.copyfile(local, temporary)

        self._publish(key, fill, create_only=False)

    def get_file(self, key: str, local: Path) -> None:
        """Copies an object to a plain file."""
        shutil.copyfile(self._root / key, local)

    def size(self, key: str) -> int | None:
        """Returns the object's size in bytes, or None if it does not exist."""
        try:
            status = (self._root / key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def keys(self, prefix: str) -> Iterator[str]:
        """Yields all keys below `prefix`, in no particular order, including temporary files."""
        for folder, _, names in os.walk(self._root / prefix, onerror=_raise_unless_missing):
            below = Path(folder).relative_to(self._root)
            yield from ((below / name).as_posix() for name in names)

    def delete(self, key: str) -> None:
        """Deletes an object, if it exists."""
        (self._root / key).unlink(missing_ok=True)

    def delete_all(self, prefix: str) -> None:
        """Deletes everything below `prefix`, including leftover temporary files."""
        for folder, _, names in os.walk(self._root / prefix, topdown=False):
            for name in names:
                Path(folder, name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another writer may have added a file
                os.rmdir(folder)

    def remedy(self, error: Exception) -> str:
        """Returns advice on how to fix an error of the file system."""
        if isinstance(error, PermissionError):
            return "choose a folder that this user may read and write"
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return (
                "the disk is full: free some space, or choose another one; nothing partial was "
                "published"
            )
        if isinstance(error, NotADirectoryError | FileExistsError | IsADirectoryError):
            return "a file and a folder cannot share a name: remove one or choose another URL"
        return "check that the folder exists and that its disk is healthy"

    def _publish(self, key: str, fill: Callable[[Path], None], *, create_only: bool) -> bool:
        target = self._root / key
        _make_folder(target.parent)
        temporary = target.parent / f"{TEMPORARY_PREFIXES[0]}{secrets.token_hex(8)}"
        try:
            fill(temporary)
            _flush_to_disk(temporary)
            if create_only and not _create_exclusively(temporary, target):
                return False
            if not create_only:
                os.replace(temporary, target)
            _flush_to_disk(target.parent)
            return True
        finally:
            temporary.unlink(missing_ok=True)


def advice_if_unwritable(folder: Path) -> str | None:
    """Returns why a server cannot write to its folder and a remedy; None if it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, _ROOM_BYTES)
    except OSError as error:
        return f"{folder}: {error.strerror}; {LocalFolder(folder).remedy(error)}"
    return None


def _create_exclusively(temporary: Path, target: Path) -> bool:
    try:
        os.link(temporary, target)  # atomic, and fails if the target exists
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # Like an object store without conditional writes; `probe` reports this.
        os.replace(temporary, target)
    return True


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _flush_to_disk(folder.parent)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
