"""Files of a model, stored below a run or at any other path or URL.

A folder that dist_tl wrote has SHA256SUMS, as `sha256sum --check` reads it, with every other file.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_tl.config import StrictModel
from dist_tl.contents import Manifest, digest_of, manifest_of, split_pin
from dist_tl.errors import ConfigError, DamagedError, DataError
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import read_record, write_record

FILES = (layout.MODEL_TENSORS, layout.MODEL_CONFIG)
SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")


def write_model_files(store: ObjectStore, prefix: str, files: Mapping[str, bytes]) -> None:
    """Writes the files of a model below `prefix`, and the digests of each folder after its files.

    Args:
        files: content by path below `prefix`.
    """
    sums: dict[str, str] = {}
    for path, data in sorted(files.items()):
        store.write(f"{prefix}/{path}", data)
        folder, slash, name = path.rpartition("/")
        line = f"{hashlib.sha256(data).hexdigest()}  {name}\n"
        sums[f"{folder}{slash}{SUMS}"] = sums.get(f"{folder}{slash}{SUMS}", "") + line
    for path in sorted(sums, reverse=True):  # that of the whole model last
        store.write(f"{prefix}/{path}", sums[path].encode())


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
        DamagedError: a file of the run, or of a folder that dist_tl wrote, was altered.
        DataError: a file of a pinned place has changed since the run started.
    """
    place, digest = split_pin(location)
    folder = _folder(store, place)
    contents = {name: folder.read_or_none(name) for name in names}
    sums = folder.read_or_none(SUMS)
    if sums is not None:
        _verify(folder.url, _marker(place), sums, contents)
    _require(folder, [name for name, data in contents.items() if data is None])
    found = {name: data for name, data in contents.items() if data is not None}
    if digest:
        _check_unchanged(store, location, found)
    return found


def read_all_files(store: ObjectStore, prefix: str) -> dict[str, bytes]:
    """Returns all files of a model of the run by their path below `prefix`, without the digests.

    Raises:
        DamagedError: a file is not the one that was written.
    """
    folders: dict[str, list[str]] = {}
    for key in store.list(prefix):
        folder, _, name = key.rpartition("/")
        if name != SUMS:
            folders.setdefault(folder, []).append(name)
    return {
        f"{folder}/{name}".removeprefix(f"{prefix}/"): data
        for folder, names in folders.items()
        for name, data in read_named_files(store, folder, names).items()
    }


def _check_unchanged(store: ObjectStore, location: str, files: Mapping[str, bytes]) -> None:
    place, digest = split_pin(location)
    part = location.partition(digest)[2].lstrip("/")  # below the place that is pinned
    # None before the run is claimed: the digest of the place has just been computed then.
    manifest = read_manifest(store, digest)
    for name, data in files.items():
        path = f"{part}/{name}" if part else name
        if manifest and manifest.get(path) != (len(data), hashlib.sha256(data).hexdigest()):
            raise DataError(
                f"{place}: {name} has changed since the run started; restore the file and start "
                "the same job again, or start another run (run=...)"
            )


class InputManifest(StrictModel):
    """Size and SHA-256 of the files of one input, by relative path."""

    files: dict[str, tuple[int, str]]


def write_manifest(store: ObjectStore, manifest: Manifest) -> None:
    """Stores the manifest of an input in a run, under its digest."""
    key = layout.input_key(digest_of(manifest))
    if not store.exists(key):
        write_record(store, key, InputManifest(files=manifest))


def read_manifest(store: ObjectStore, digest: str) -> Manifest:
    """Returns the manifest of an input of a run; empty if the run has no such input.

    Raises:
        DamagedError: it is not the one that was written.
    """
    key, remedy = layout.input_key(digest), "start the same job again, which writes it again"
    record = read_record(store, key, InputManifest, remedy=remedy)
    return record.files if record else {}


def model_manifest(store: ObjectStore, location: str) -> Manifest:
    """Returns the manifest of the JSON and safetensors files below a model's place.

    Digests of a remote folder that dist_tl wrote are those in its SHA256SUMS: its files are not
    read.
    """
    folder = _folder(store, split_pin(location)[0])
    keys = [key for key in folder.list() if key.endswith((".json", ".safetensors"))]
    if "://" not in folder.url:
        return manifest_of({key: Path(folder.url) / key for key in keys})
    sums = {key: _sums_beside(folder, key) for key in keys}
    return {key: (folder.size(key), sums[key] or _digest(folder.read(key)) or "") for key in keys}


def _sums_beside(folder: ObjectStore, key: str) -> str | None:
    parent, slash, name = key.rpartition("/")
    sums = folder.read_or_none(f"{parent}{slash}{SUMS}") or b""
    matches = map(_LINE.fullmatch, sums.decode(errors="replace").splitlines())
    return next((match[1] for match in matches if match is not None and match[2] == name), None)


def _marker(location: str) -> str:
    is_in_run = location != "." and _is_key(location)
    return layout.marker_of(f"{location}/{SUMS}") if is_in_run else ""


def _verify(url: str, marker: str, sums: bytes, contents: Mapping[str, bytes | None]) -> None:
    lines = sums.decode(errors="replace").splitlines()
    matches = [_LINE.fullmatch(line) for line in lines]
    digests = {match[2]: match[1] for match in matches if match is not None}
    if len(digests) < len(lines) or not digests:
        problem = f"{SUMS} is not a list of digests and file names"
    else:
        wrong = [name for name, data in contents.items() if _digest(data) != digests.get(name, "")]
        problem = f"{', '.join(wrong)} differs from its digest in {SUMS}" if wrong else ""
    if problem:
        remedy = "start the same job again" if marker else "copy the folder again"
        raise DamagedError.of(f"the model at {url} is damaged: {problem}; {remedy}", marker)


def _digest(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def check_model_files(store: ObjectStore, location: str) -> None:
    """Checks that the two files of a network exist, without reading them.

    Raises:
        ConfigError: a file is missing.
    """
    folder = _folder(store, split_pin(location)[0])
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
