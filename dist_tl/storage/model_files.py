"""Files of a model, stored below a run or at any other path or URL."""

import hashlib
from collections.abc import Mapping, Sequence

from dist_tl.errors import ConfigError
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore

FILES = (layout.MODEL_TENSORS, layout.MODEL_CONFIG)


def read_model_files(store: ObjectStore, location: str) -> dict[str, bytes]:
    """Returns the two files of a network.

    Args:
        location: a key of the run's store ("." is the store itself), a path or a URL.

    Raises:
        ConfigError: a file is missing.
    """
    return read_named_files(store, location, FILES)


def read_named_files(store: ObjectStore, location: str, names: Sequence[str]) -> dict[str, bytes]:
    """Returns files of a model by name; `location` as in :func:`read_model_files`.

    Raises:
        ConfigError: a file is missing.
    """
    folder = _folder(store, location)
    contents = {name: folder.read_or_none(name) for name in names}
    _require(folder, [name for name, data in contents.items() if data is None])
    return {name: data for name, data in contents.items() if data is not None}


def check_model_files(store: ObjectStore, location: str) -> None:
    """Checks that the two files of a network exist, without reading them.

    Raises:
        ConfigError: a file is missing.
    """
    folder = _folder(store, location)
    _require(folder, [name for name in FILES if not folder.exists(name)])


def _folder(store: ObjectStore, location: str) -> ObjectStore:
    if location == ".":
        return store
    return store.child(location) if _is_key(location) else ObjectStore(location)


def _require(folder: ObjectStore, missing: Sequence[str]) -> None:
    if missing:
        raise ConfigError(f"no model at {folder.url}: {' and '.join(missing)} not found there")


def _is_key(location: str) -> bool:
    return not ("://" in location or location.startswith(("/", "./", "../", "~")))


def absolute_place(location: str) -> str:
    """Returns a path relative to the working directory, or a URL, in a form that is not a key."""
    return f"./{location}" if _is_key(location) else location


def files_fingerprint(files: Mapping[str, bytes]) -> str:
    """Returns 16 hexadecimal digits that identify the contents of a model's files."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(hashlib.sha256(files[name]).digest())
    return digest.hexdigest()[:16]
