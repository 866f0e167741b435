"""What a job will do, as rows: its stages, shards, tasks and actors. Starts nothing."""

from collections.abc import Sequence
from typing import Protocol

from pydantic import Field

from dist_tl.config import StrictModel
from dist_tl.jobs.inputs import pin_inputs
from dist_tl.jobs.kinds import KINDS
from dist_tl.jobs.overview import Overview, overview_of
from dist_tl.jobs.spec import JobConfig, TrainingJobConfig
from dist_tl.models.networks import parameter_count
from dist_tl.report.results import Table
from dist_tl.shards.drawing import GenerateSpec
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.models import NewGenerator, NewNetwork, build_model
from dist_tl.train.spec import StageSpec

BYTES_PER_PARAMETER = 12  # float32 weights and Adam's two moments
TAR_OVERHEAD = 3 * 1024  # headers and padding of a sample's three members
NEW_RUN = "memory://plan"


class TrainRow(StrictModel):
    """One training stage."""

    stage: str
    objective: str
    steps: int
    rows_per_step: int
    parameters: int | None
    checkpoint_bytes: int | None


class GenerateRow(StrictModel):
    """One stage of pseudo samples."""

    stage: str
    shards: int
    samples: int
    bytes_at_most: int


class TaskRow(StrictModel):
    """Independent tasks of one phase."""

    phase: str
    tasks: int
    work: str


class PlanTable(StrictModel):
    """The whole job."""

    run: str
    store: str
    actors: dict[str, str]
    generate: tuple[GenerateRow, ...]
    train: tuple[TrainRow, ...]
    trials: int
    tasks: tuple[TaskRow, ...]
    tables: tuple[Table, ...]
    overview: Overview | None = Field(default=None, description="What the job is given.")


class Plan(Protocol):
    """The stages and tasks of one job."""

    def table(self) -> PlanTable:
        """The plan as rows."""
        ...


def plan_job(job: JobConfig) -> PlanTable:
    """Checks the job against its data; lists what it is given and what a new run of it would do.

    Raises:
        ConfigError: the job cannot work.
        DataError: its data is damaged.
    """
    # An empty store: planning neither waits for a remote one nor depends on what it holds.
    store = ObjectStore(NEW_RUN)
    job, _ = pin_inputs(job, store)
    table = KINDS[job.kind].plan(job, store).table()
    return table.model_copy(update={"overview": overview_of(job)})


def plan_table(
    job: JobConfig,
    *,
    generate: Sequence[GenerateSpec] = (),
    train: Sequence[StageSpec] = (),
    tasks: Sequence[TaskRow] = (),
    trials: int = 0,
    tables: Sequence[Table] = (),
) -> PlanTable:
    """The rows of a job's stages and tasks, with the actors that it asks for.

    Args:
        trials: short cross-validation trainings next to the stages.
    """
    sizes = _parameters(train)
    return PlanTable(
        run=job.run,
        store=job.store,
        actors=_actors(job),
        generate=tuple(map(_generate_row, generate)),
        train=tuple(_train_row(spec, sizes.get(_model_key(spec))) for spec in train),
        trials=trials,
        tasks=tuple(tasks),
        tables=tuple(tables),
    )


def _actors(job: JobConfig) -> dict[str, str]:
    actors = {}
    if isinstance(job, TrainingJobConfig):
        actors["trainers"] = f"{job.trainers.workers} x {_resources(job.trainers)}"
    for role in ("generators", "experts", "trials"):
        if (pool := getattr(job, role, None)) is not None:
            count = "as CPUs allow" if role == "trials" else f"{pool.min} to {pool.max}"
            count += " of each" if role == "experts" else ""
            actors[role] = f"{count} x {_resources(pool)}"
    return actors


class _Pool(Protocol):
    @property
    def cpus(self) -> float: ...
    @property
    def gpus(self) -> float: ...


def _resources(pool: _Pool) -> str:
    return f"{pool.cpus:g} CPU" + (f" + {pool.gpus:g} GPU" if pool.gpus else "")


def _generate_row(spec: GenerateSpec) -> GenerateRow:
    channels, height, width = spec.image_shape
    per_sample = channels * height * width + 4 * spec.num_classes + TAR_OVERHEAD
    return GenerateRow(
        stage=spec.name,
        shards=spec.plan().num_shards,
        samples=spec.num_samples,
        bytes_at_most=spec.num_samples * per_sample,
    )


def _train_row(spec: StageSpec, parameters: int | None) -> TrainRow:
    return TrainRow(
        stage=spec.name,
        objective=spec.objective.kind,
        steps=spec.steps,
        rows_per_step=spec.batch_size + spec.unlabelled_batch_size,
        parameters=parameters,
        checkpoint_bytes=None if parameters is None else parameters * BYTES_PER_PARAMETER,
    )


def _model_key(spec: StageSpec) -> str:
    """Stages with one key train models of one size."""
    return spec.model.model_dump_json()


def _parameters(stages: Sequence[StageSpec]) -> dict[str, int]:
    """Sizes of the models that can be built without an earlier stage's result."""
    new = {
        _model_key(spec): spec
        for spec in stages
        if isinstance(spec.model, NewNetwork | NewGenerator)
    }
    store = ObjectStore(NEW_RUN)  # new models read nothing from it
    return {
        key: parameter_count(
            build_model(spec.model, store, image_shape=spec.image_shape, seed=spec.seed)
        )
        for key, spec in new.items()
    }
