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
from dist_tl.errors import ConfigError, DataError
from dist_tl.jobs.identity import stored_job
from dist_tl.jobs.places import names_model
from dist_tl.jobs.spec import JobConfig
from dist_tl.storage.model_files import model_manifest
from dist_tl.storage.objects import ObjectStore

Job = TypeVar("Job", bound=JobConfig)


@runtime_checkable
class NamesFiles(Protocol):
    """A configuration that names local files."""

    def named_files(self) -> Mapping[str, Mapping[str, Path]]:
        """Returns the files that are read, name -> path, by the place that names them."""
        ...


def pin_inputs(job: Job, store: ObjectStore) -> tuple[Job, list[Manifest]]:
    """Returns `job` with its inputs pinned, and the manifests of the inputs. Writes nothing.

    An input that a run no longer finds keeps its pin: a resumed run may have finished with it.

    Raises:
        ConfigError: an input of a new run is missing.
        DataError: an input is pinned already, in the job file, and has another content.
    """
    pins = _Pins(store)
    return pins.model(job), pins.manifests


class _Pins:
    """Pins the parts of one job."""

    def __init__(self, store: ObjectStore) -> None:
        self._store, self._before = store, _pins_of_run(store)
        self.manifests: list[Manifest] = []

    def model(self, model: Any) -> Any:
        """Returns `model`, or a copy in which places are pinned."""
        places, changed = self._named_files(model), {}
        reads_itself = isinstance(model, NamesFiles)
        for name, field in type(model).model_fields.items():
            value = getattr(model, name)
            is_place = isinstance(value, str) and names_model(field)
            if is_place and not reads_itself:
                changed[name] = self._model_place(value)
            elif (new := self._value(value, places)) is not value:
                changed[name] = new
        return model.model_copy(update=changed) if changed else model

    def _value(self, value: Any, places: Mapping[str, str]) -> Any:
        if isinstance(value, str):
            return places.get(value, value)
        if isinstance(value, BaseModel):
            return self.model(value)
        if isinstance(value, dict):
            items = {key: self._value(item, places) for key, item in value.items()}
            return items if any(items[key] is not value[key] for key in value) else value
        if isinstance(value, list | tuple):
            parts = [self._value(item, places) for item in value]
            same = all(new is old for new, old in zip(parts, value, strict=True))
            return value if same else type(value)(parts)
        return value

    def _named_files(self, model: Any) -> dict[str, str]:
        if not isinstance(model, NamesFiles):
            return {}
        try:
            named = model.named_files()
        except ConfigError:
            gone = {place: self._before.get(_absolute(place)) for place in _strings(model)}
            kept = {place: pin for place, pin in gone.items() if pin is not None}
            if not kept:
                raise
            return kept
        return {
            place: self._pin(place, manifest_of(files), local=bool(files))
            for place, files in named.items()
        }

    def _model_place(self, place: str) -> str:
        manifest = model_manifest(self._store, place)
        if not manifest and (kept := self._before.get(_absolute(place))):
            return kept
        return self._pin(place, manifest, local="://" not in place)

    def _pin(self, place: str, manifest: Manifest, *, local: bool) -> str:
        path, insisted = split_pin(place)
        digest = digest_of(manifest)
        if insisted and insisted != digest:
            raise DataError(
                f"{path}: expected the content with the digest {insisted}, as the job file says, "
                f"found {digest}; restore the files, or change the digest"
            )
        self.manifests.append(manifest)
        # Workers may have another working directory. The name of a hub's model is not a path.
        is_path = local and (Path(path).expanduser().exists() or any(c in path for c in "*?["))
        return pinned(_absolute(path) if is_path else path, digest)


def _pins_of_run(store: ObjectStore) -> dict[str, str]:
    """Returns the pinned places of the run's job.json by the place; none if it is damaged."""
    record = stored_job(store)
    places = _strings(record.job) if record else []
    return {split_pin(place)[0]: place for place in places if split_pin(place)[1]}


def _strings(value: Any) -> list[str]:
    """Returns all strings in a value."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def _absolute(place: str) -> str:
    path = split_pin(place)[0]
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))
