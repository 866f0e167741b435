"""Temporary folders that do not outlive their owner: it removes them, or else a later process does.

The owner holds a lock on a file in its folder, which the kernel drops however the owner dies. So a
folder with a free lock has no owner, also if the owner ran in another container or its process ID
is used again.
"""

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

MARKER = "dist_tl.lock"  # holds the process ID of the owner


class ScratchFolder:
    """A new folder that only this user can read.

    Attributes:
        path: of the folder.

    Args:
        prefix: of the folder's name, the same for all folders of one purpose.
        parent: None uses the temporary folder of the system.
    """

    def __init__(self, prefix: str, *, parent: str | None = None) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        unlocked = self.path / f"{MARKER}.new"
        unlocked.write_text(f"{os.getpid()}\n")
        self._lock = os.open(unlocked, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unlocked.rename(self.path / MARKER)  # nobody sees the marker without its lock

    def remove(self) -> None:
        """Removes the folder and everything in it. Safe to call again."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_stale(
    prefix: str,
    *,
    parent: str | None = None,
    before: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Removes the folders of this user whose owner died.

    Args:
        prefix: as for :class:`ScratchFolder`.
        before: called with each folder, e.g. to end processes that still use it.
    """
    for folder in sorted(Path(parent or tempfile.gettempdir()).glob(f"{prefix}*")):
        if (lock := _take_over(folder)) is not None:
            before(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _take_over(folder: Path) -> int | None:
    """Takes the lock of a folder of this user; None if there is none, or its owner lives."""
    try:
        status = folder.lstat()
        if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
            return None
        lock = os.open(folder / MARKER, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
