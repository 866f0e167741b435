"""Pins a job to the content of its inputs: data sets, models and generators outside the run.

A place that is pinned (`dist_tl/contents.py`) is the same input wherever it lies, and another one
as soon as a file differs. The job is walked by the types of its fields, as in `places.py`: a
configuration that reads local files by itself has `named_files`; any other model's place is a
folder of a store.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel

from dist_tl.contents import Manifest, digest_of, manifest_of, pinned, split_pin
from dist_tl.errors import DataError
from dist_tl.jobs.places import names_model
from dist_tl.jobs.spec import JobConfig
from dist_tl.storage.model_files import model_manifest, write_manifest
from dist_tl.storage.objects import ObjectStore

Job = TypeVar("Job", bound=JobConfig)


@runtime_checkable
class NamesFiles(Protocol):
    """A configuration that names local files."""

    def named_files(self) -> Mapping[str, Mapping[str, Path]]:
        """Returns the files that are read, name -> path, by the place that names them."""
        ...


def pin_inputs(job: Job, store: ObjectStore) -> Job:
    """Returns `job` with its inputs pinned; stores their manifests in the run.

    Raises:
        ConfigError: an input is missing.
        DataError: an input is pinned already, in the job file, and has another content.
    """
    return _pinned_model(job, store)


def _pinned_model(model: Any, store: ObjectStore) -> Any:
    places = _pins(model, store)
    changed = {}
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        own = {value: _pin_model_place(value, store)} if _is_place(field, value, model) else places
        if (new := _pinned_value(value, own, store)) is not value:
            changed[name] = new
    return model.model_copy(update=changed) if changed else model


def _is_place(field: Any, value: Any, model: BaseModel) -> bool:
    return isinstance(value, str) and names_model(field) and not isinstance(model, NamesFiles)


def _pinned_value(value: Any, places: Mapping[str, str], store: ObjectStore) -> Any:
    """Returns `value`, or a copy in which a place is pinned."""
    if isinstance(value, str):
        return places.get(value, value)
    if isinstance(value, BaseModel):
        return _pinned_model(value, store)
    if isinstance(value, dict):
        items = {key: _pinned_value(item, places, store) for key, item in value.items()}
        return items if any(items[key] is not value[key] for key in value) else value
    if isinstance(value, list | tuple):
        parts = [_pinned_value(item, places, store) for item in value]
        same = all(new is old for new, old in zip(parts, value, strict=True))
        return value if same else type(value)(parts)
    return value


def _pins(model: Any, store: ObjectStore) -> dict[str, str]:
    if not isinstance(model, NamesFiles):
        return {}
    return {
        place: _pin(place, manifest_of(files), store, local=bool(files))
        for place, files in model.named_files().items()
    }


def _pin_model_place(place: str, store: ObjectStore) -> str:
    return _pin(place, model_manifest(store, place), store, local="://" not in place)


def _pin(place: str, manifest: Manifest, store: ObjectStore, *, local: bool) -> str:
    path, insisted = split_pin(place)
    digest = digest_of(manifest)
    if insisted and insisted != digest:
        raise DataError(
            f"{path}: expected the content with the digest {insisted}, as the job file says, found "
            f"{digest}; restore the files, or change the digest"
        )
    write_manifest(store, manifest)
    # Workers may have another working directory. The name of a hub's model is not a path.
    is_path = local and (Path(path).expanduser().exists() or any(c in path for c in "*?["))
    return pinned(os.path.abspath(os.path.expanduser(path)) if is_path else path, digest)
