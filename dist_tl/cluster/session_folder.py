"""The folder of a private Ray cluster: in TMPDIR if its path is short enough for Ray's sockets."""

import os
import tempfile
from pathlib import Path

from dist_tl.errors import WorkerError

PREFIX = "dtl-"
MAX_SOCKET_PATH_BYTES = 107  # of Linux
# The longest path that Ray makes below the parent of the folder. Process IDs have up to 7 digits.
_LONGEST = "/dtl-12345678/ray/session_2026-01-31_12-34-56_123456_1234567/sockets/plasma_store"
MAX_PARENT_BYTES = MAX_SOCKET_PATH_BYTES - len(_LONGEST)
_OTHER_PARENTS = ("/tmp", "/var/tmp", "/dev/shm")


def session_parent() -> Path:
    """Returns the temporary folder, or the first other one that is short and can be written to.

    Raises:
        WorkerError: there is none.
    """
    first = temporary_folder()
    for parent in (first, *_OTHER_PARENTS):
        if len(os.fsencode(parent)) <= MAX_PARENT_BYTES and _is_writable(parent):
            return Path(parent)
    raise WorkerError(
        "Ray needs a folder for its sockets that this user can write to and whose path has at most "
        f"{MAX_PARENT_BYTES} bytes; {first} has {len(os.fsencode(first))}, and "
        f"{', '.join(_OTHER_PARENTS)} cannot be used either: set TMPDIR to such a folder"
    )


def temporary_folder() -> str:
    """Returns the folder in TMPDIR, or else Python's default, that this user can write to.

    Raises:
        WorkerError: there is none.
    """
    try:
        return os.path.abspath(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise WorkerError(f"{error}; set TMPDIR to a folder that this user can write to") from None


def _is_writable(folder: str) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
