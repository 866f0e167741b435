"""What a job names: its data sets and the models that exist already, by dotted field.

The job is walked by the types of its fields, so a new data source or a new kind of job needs
nothing here: a data set is a member of `DataConfig`, a model's field is marked with `NamesModel`.
"""

from collections.abc import Iterator
from typing import Any, TypeGuard, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dist_tl.config import NamesModel
from dist_tl.datasets.spec import DataConfig
from dist_tl.jobs.spec import JobConfig

DATA_SETS: tuple[type[BaseModel], ...] = get_args(get_args(DataConfig)[0])


# Dotted path, field and value.
Entry = tuple[str, FieldInfo, Any]


def data_sets(job: JobConfig) -> dict[str, DataConfig]:
    """Returns the data sets of a job by dotted field, e.g. `hub.0.train.data`, in field order.

    A mixture is one data set; its domains are not listed.
    """
    return {path: value for path, _, value in _values(job) if _is_data_set(value)}


def models(job: JobConfig) -> dict[str, str]:
    """Returns the folders, URLs and hub names of models by dotted field, in field order."""
    return {
        path: value
        for path, field, value in _values(job)
        if isinstance(value, str) and names_model(field)
    }


def owners(job: JobConfig) -> dict[str, BaseModel]:
    """Returns the part of a job below every dotted field that holds one; the job itself is ""."""
    parts = {path: value for path, _, value in _values(job) if isinstance(value, BaseModel)}
    return {"": job, **parts}


def _values(model: BaseModel, prefix: str = "") -> Iterator[Entry]:
    """Yields every value below `model` with its path and the field that it belongs to."""
    for name, field in type(model).model_fields.items():
        yield from _below(f"{prefix}{name}", field, getattr(model, name))


def _below(path: str, field: FieldInfo, value: Any) -> Iterator[Entry]:
    yield path, field, value
    if isinstance(value, BaseModel) and not isinstance(value, DATA_SETS):
        yield from _values(value, f"{path}.")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _below(f"{path}.{key}", field, item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _below(f"{path}.{index}", field, item)


def _is_data_set(value: object) -> TypeGuard[DataConfig]:
    return isinstance(value, DATA_SETS)


def names_model(field: FieldInfo) -> bool:
    """Whether a field names a stored model."""
    marks = [*field.metadata, *_annotations(field.annotation)]
    return any(isinstance(mark, NamesModel) for mark in marks)


def _annotations(annotation: Any) -> Iterator[Any]:
    """Yields everything inside an annotation, e.g. the marks in `Annotated[str, mark] | None`."""
    for part in get_args(annotation):
        yield part
        yield from _annotations(part)
