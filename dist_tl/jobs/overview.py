"""What a job is given: its data sets, identical pictures in them, and the models that exist.

Shown by `dist-tl plan`, and at the start of a new run. Reads every data set once; the plan of the
job uses the same loaded images.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from pydantic import Field

from dist_tl.config import StrictModel
from dist_tl.datasets.images import LabelledImages
from dist_tl.datasets.spec import DataConfig
from dist_tl.errors import ConfigError
from dist_tl.jobs.duplicates import PictureIndex, SharedPictures, check_duplicates
from dist_tl.jobs.places import data_sets, models, owners
from dist_tl.jobs.spec import JobConfig
from dist_tl.models.inputs import InputConfig
from dist_tl.report.results import Table
from dist_tl.train.descriptions import ModelDescription, describe_model
from dist_tl.train.rows import RowsSpec, load_rows

MAX_NAMED_CLASSES = 12
KEPT_TOGETHER = "Copies stay on one side of every split, fold and episode of the target data."


class DataSummary(StrictModel):
    """One data set as the job uses it."""

    source: str
    images: int
    classes: dict[str, int] = Field(description="Class name -> number of images.")
    image_shape: tuple[int, int, int] = Field(description="(channels, height, width).")
    domains: tuple[str, ...] = ()
    passed_over: dict[str, int] = Field(
        description="Files that are neither images nor labels, by suffix; hidden ones not counted."
    )


class Overview(StrictModel):
    """What a job is given, by the dotted fields that name it."""

    data: dict[str, DataSummary]
    duplicates: str = Field(description="The job's setting.")
    shared: tuple[SharedPictures, ...]
    models: dict[str, ModelDescription]

    def lines(self) -> Iterator[str]:
        """Yields short lines for the start of a run."""
        for field, data in self.data.items():
            skipped = f"; {_passed_over(data)}" if data.passed_over else ""
            yield (
                f"{field}: {data.images} images {_shape(data.image_shape)} ({data.source}), "
                f"{_classes(data.classes)}{skipped}"
            )
        for row in self.shared:
            yield f"identical pictures ({self.duplicates}): {row.text}"
        for field, model in self.models.items():
            yield f"{field}: {_model_text(model)}"

    def tables(self) -> Iterator[Table]:
        """Yields the tables of a plan; leaves out empty ones."""
        if self.data:
            yield _data_table(self.data)
        if self.shared:
            yield _shared_table(self.shared, self.duplicates)
        if self.models:
            header = ("field", "architecture", "classes", "images", "inputs", "parameters")
            rows = tuple((field, *_model_cells(model)) for field, model in self.models.items())
            yield Table(title="Models", header=header, rows=rows)


def _data_table(summaries: Mapping[str, DataSummary]) -> Table:
    header = ("field", "source", "images", "size", "classes", "passed over")
    rows = tuple(
        (
            *(field, data.source, str(data.images), _shape(data.image_shape)),
            *(_classes(data.classes), _passed_over(data)),
        )
        for field, data in summaries.items()
    )
    used = len(header) if any(row[-1] for row in rows) else -1
    return Table(title="Data", header=header[:used], rows=tuple(row[:used] for row in rows))


def _shared_table(shared: Sequence[SharedPictures], duplicates: str) -> Table:
    rows = tuple(
        (
            *(row.first, "itself" if row.first == row.second else row.second),
            *(str(row.pictures), str(row.labels_differ or ""), " = ".join(row.example)),
        )
        for row in shared
    )
    return Table(
        title=f"Identical pictures (duplicates: {duplicates})",
        header=("in", "also in", "pictures", "labels differ", "example"),
        rows=rows,
        note=KEPT_TOGETHER if duplicates == "together" else "",
    )


def overview_of(job: JobConfig) -> Overview:
    """Reads what a job names and applies its `duplicates`.

    Raises:
        ConfigError: a model or data is missing or does not fit, or identical pictures are refused.
        DataError: data is damaged.
    """
    data, index = {}, PictureIndex(job)
    for field, config in data_sets(job).items():
        images = load_rows(RowsSpec(data=config))
        data[field] = _summary(config, images)
        index.add(field, images)
    shared = index.shared()
    check_duplicates(job, shared)
    return Overview(data=data, duplicates=job.duplicates, shared=shared, models=_models(job))


def _summary(config: DataConfig, images: LabelledImages) -> DataSummary:
    counts = np.bincount(images.labels, minlength=images.num_classes).tolist()
    return DataSummary(
        source=config.source,
        images=len(images),
        classes=dict(zip(images.class_names, counts, strict=True)),
        image_shape=images.image_shape,
        domains=images.domain_names,
        passed_over=dict(images.passed_over),
    )


def _models(job: JobConfig) -> dict[str, ModelDescription]:
    parts, described = owners(job), {}
    for field, place in models(job).items():
        owner = parts.get(field.rpartition(".")[0])
        inputs = owner if isinstance(owner, InputConfig) else None
        try:
            described[field] = describe_model(place, inputs)
        except ConfigError as error:
            raise ConfigError(f"{field}: {error}") from None
    return described


def _shape(shape: tuple[int, int, int]) -> str:
    channels, height, width = shape
    return f"{width} x {height} {'grey' if channels == 1 else 'colour'}"


def _classes(classes: Mapping[str, int]) -> str:
    if len(classes) <= MAX_NAMED_CLASSES:
        named = ", ".join(f"{name} {count}" for name, count in classes.items())
        return f"{_count(len(classes), 'class', 'classes')}: {named}"
    ordered = sorted(classes, key=lambda name: classes[name])
    smallest, largest = ordered[0], ordered[-1]
    median = ordered[len(ordered) // 2]
    return (
        f"{len(classes)} classes: smallest {smallest} {classes[smallest]}, median {median} "
        f"{classes[median]}, largest {largest} {classes[largest]}"
    )


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _passed_over(data: DataSummary) -> str:
    if not data.passed_over:
        return ""
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in data.passed_over.items())
    return f"{_count(sum(data.passed_over.values()), 'file', 'files')} passed over: {kinds}"


def _model_cells(model: ModelDescription) -> tuple[str, str, str, str, str]:
    return (
        model.architecture,
        "" if model.num_classes is None else str(model.num_classes),
        "" if model.image_shape is None else _shape(model.image_shape),
        model.inputs,
        "" if model.parameters is None else f"{model.parameters:,}",
    )


def _model_text(model: ModelDescription) -> str:
    architecture, classes, shape, inputs, parameters = _model_cells(model)
    parts = (
        *(architecture, classes and f"{classes} classes", shape, inputs),
        parameters and f"{parameters} parameters",
    )
    return ", ".join(part for part in parts if part)
