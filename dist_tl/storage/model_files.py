"""Where a model's files are: below a run, or anywhere a user keeps models."""

import hashlib
from collections.abc import Mapping, Sequence

from dist_tl.errors import ConfigError
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore

FILES = (layout.MODEL_TENSORS, layout.MODEL_CONFIG)


def read_model_files(store: ObjectStore, place: str) -> dict[str, bytes]:
    """The two files of a network: a key of the run's store, or a URL or path of its own.

    "." is the store itself.

    Raises:
        ConfigError: a file is missing.
    """
    return read_named_files(store, place, FILES)


def read_named_files(store: ObjectStore, place: str, names: Sequence[str]) -> dict[str, bytes]:
    """Files of a model, by name; `place` as for :func:`read_model_files`.

    Raises:
        ConfigError: a file is missing.
    """
    folder = _folder(store, place)
    found = {name: folder.read_or_none(name) for name in names}
    _require(folder, [name for name, data in found.items() if data is None])
    return {name: data for name, data in found.items() if data is not None}


def check_model_files(store: ObjectStore, place: str) -> None:
    """That the two files of a network are there, without reading them.

    Raises:
        ConfigError: a file is missing.
    """
    folder = _folder(store, place)
    _require(folder, [name for name in FILES if not folder.exists(name)])


def _folder(store: ObjectStore, place: str) -> ObjectStore:
    if place == ".":
        return store
    return store.child(place) if _is_key(place) else ObjectStore(place)


def _require(folder: ObjectStore, missing: Sequence[str]) -> None:
    if missing:
        raise ConfigError(f"no model at {folder.url}: {' and '.join(missing)} not found there")


def _is_key(place: str) -> bool:
    return not ("://" in place or place.startswith(("/", "./", "../")))


def absolute_place(place: str) -> str:
    """A folder as a user names it, relative to where the job is started, or a URL."""
    return f"./{place}" if _is_key(place) else place


def files_fingerprint(files: Mapping[str, bytes]) -> str:
    """16 hexadecimal digits that stand for a model's files."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(hashlib.sha256(files[name]).digest())
    return digest.hexdigest()[:16]
