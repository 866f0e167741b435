"""Contents of input files: their manifest, and places that are pinned to one.

A pinned place, e.g. `data/birds#sha256=0123456789abcdef`, names files and the digest of their
manifest. A run pins all its inputs when it starts: whoever reads a pinned place checks that the
files still have that content, and fingerprints contain the digest in place of the path.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dist_tl.errors import DataError

_PIN = re.compile(r"(.*)#sha256=([0-9a-f]{16})(/.*)?", re.DOTALL)
_PIN_IN_JSON = re.compile(r'"(?:[^"\\]|\\.)*#sha256=([0-9a-f]{16}(?:/(?:[^"\\]|\\.)*)?)"')
_NAMED = 5  # differing files that a message names
_RACY_NS = 2_000_000_000  # a file this young may change again without a new time stamp
_THREADS = 8

# Size in bytes and SHA-256 of each file, by its path relative to the place.
Manifest = dict[str, tuple[int, str]]


def pinned(place: str, digest: str) -> str:
    """Returns `place` pinned to the digest of a manifest."""
    return f"{place}#sha256={digest}"


def split_pin(place: str) -> tuple[str, str]:
    """Returns the place without its pin, and the digest, or "" if it is not pinned."""
    match = _PIN.fullmatch(place)
    return (match[1] + (match[3] or ""), match[2]) if match else (place, "")


def without_places(text: str) -> str:
    """Returns a JSON text with the digest alone in place of every pinned place."""
    return _PIN_IN_JSON.sub(r'"sha256=\1"', text) if "#sha256=" in text else text


def digest_of(manifest: Manifest) -> str:
    """Returns 16 hexadecimal digits that change if a file's name or content does."""
    text = json.dumps(sorted(manifest.items()), separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_pin(place: str, files: Mapping[str, Path]) -> None:
    """Checks that the files of a place have the content that it is pinned to, if it is.

    Raises:
        DataError: they have another one, or a file cannot be read.
    """
    path, digest = split_pin(place)
    if digest and (now := digest_of(manifest_of(files))) != digest:
        raise DataError(
            f"{path} has changed since the run started: its content has the digest {now}, the run "
            f"began with {digest}; restore the files and start the same job again, or start "
            "another run (run=...)"
        )


def differing_files(old: Manifest, new: Manifest) -> str:
    """Returns the names of files that differ between two manifests, for messages."""
    changes = [
        *(f"{name} is new" for name in sorted(new.keys() - old.keys())),
        *(f"{name} is gone" for name in sorted(old.keys() - new.keys())),
        *(f"{name} differs" for name in sorted(old.keys() & new.keys()) if old[name] != new[name]),
    ]
    more = f" and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
    return ", ".join(changes[:_NAMED]) + more


def manifest_of(files: Mapping[str, Path]) -> Manifest:
    """Returns the manifest of local files by name.

    Hashes are cached by path, size, modification time and inode, so only files that changed are
    read.

    Raises:
        DataError: a file cannot be read.
    """
    if not files:
        return {}
    paths = [os.path.abspath(path) for path in files.values()]
    cache = _HashCache(os.path.commonpath({os.path.dirname(path) for path in paths}))
    try:
        entries = cache.entries(paths)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None
    return dict(zip(files, entries, strict=True))


class _HashCache:
    """Hashes of the files below one folder, in the user's cache folder."""

    def __init__(self, folder: str) -> None:
        # Not Path.expanduser, which fails for a user without a home.
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        name = hashlib.sha256(folder.encode()).hexdigest()[:32]
        self._path = Path(home) / "dist_tl" / "hashes" / f"{name}.json"
        self._known: dict[str, list] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(self._path.read_bytes())
            self._known = known if isinstance(known, dict) else {}

    def entries(self, paths: Sequence[str]) -> list[tuple[int, str]]:
        """Returns size and SHA-256 of each file, and stores the hashes for the next use."""
        states = [_state(path) for path in paths]
        known = [self._known.get(path) for path in paths]
        changed = [i for i, state in enumerate(states) if not _is_of(known[i], state)]
        with ThreadPoolExecutor(_THREADS) as pool:
            digests = list(pool.map(_sha256, [paths[i] for i in changed]))
        for i, digest in zip(changed, digests, strict=True):
            known[i] = [*states[i], digest]
        now_ns = time.time_ns()
        used = {
            path: entry
            for path, entry in zip(paths, known, strict=True)
            if entry and now_ns - entry[1] > _RACY_NS
        }
        if used != self._known:
            self._store(used)
        return [(entry[0], entry[3]) for entry in known if entry]

    def _store(self, used: dict[str, list]) -> None:
        """A cache that cannot be written is no cache."""
        if not self._path.is_absolute():
            return
        temporary = self._path.with_suffix(f".{secrets.token_hex(4)}.part")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(used))
            os.replace(temporary, self._path)


def _state(path: str) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _is_of(entry: Any, state: list[int]) -> bool:
    return isinstance(entry, list) and entry[:3] == state and len(entry) == 4


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def relative_to(folder: Path, paths: Iterable[Path]) -> dict[str, Path]:
    """Returns paths by their name relative to a folder, with "/".

    Args:
        paths: below `folder`, and written with the same beginning.
    """
    start = "" if str(folder) == "." else str(folder).rstrip("/") + "/"
    return {str(path).removeprefix(start): path for path in paths}
