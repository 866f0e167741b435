"""Fields that every kind of job has: where it runs, from which seed, how long a stage trains.

Imports neither ray nor deepspeed, so that reading a job is quick.
"""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from dist_tl.cluster.config import SessionConfig, TrainersConfig
from dist_tl.config import NamesModel, StrictModel
from dist_tl.datasets.spec import DataConfig
from dist_tl.storage.model_files import absolute_place
from dist_tl.train.checkpoints import CheckpointConfig
from dist_tl.train.engine import EngineConfig, OptimizerConfig

NAME = r"^[a-z0-9][a-z0-9_-]{0,39}$"
# A folder or URL given by the user, not a key of the run.
ModelPlace = Annotated[str, NamesModel(), Field(min_length=1), AfterValidator(absolute_place)]


# What may change between two attempts at one run: it decides how fast results come, not which;
# except `degrade`, whose effects are marked sample by sample.
MAY_CHANGE = (
    *("generators", "experts", "degrade", "trials"),
    *("session", "checkpoints", "trainers", "store"),
)


class BudgetConfig(StrictModel):
    """Steps, batch size and optimizer of one training stage."""

    steps: int = Field(ge=1, description="Optimizer steps.")
    batch_size: int = Field(ge=1, description="Rows per step over all workers.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)


class TargetDataConfig(StrictModel):
    """The target task: little labelled data."""

    data: DataConfig
    labels_per_class: int = Field(ge=1, description="K: labelled training images of each class.")
    test_fraction: float = Field(
        default=0.5, gt=0, lt=1, description="Share set aside for testing before anything else."
    )


class JobConfig(StrictModel):
    """Where a job runs and what its draws start from."""

    kind: str = Field(description="What kind of job this is; `dist-tl run --help` lists them.")
    run: str = Field(description="Folder or URL of the run; everything is written below it.")
    store: Literal["direct", "embedded"] = Field(
        default="direct",
        description="embedded: serve the run's local folder by S3 on loopback while it runs; "
        "direct: read and write `run` as it stands.",
    )
    seed: int = Field(default=0, ge=0)
    duplicates: Literal["error", "together", "allow"] = Field(
        default="together",
        description="Identical pictures. together: on one side of every split, fold and episode of "
        "the target data; error: refuse the job if the target data has any, or shares any with "
        "other data; allow: only report them.",
    )
    session: SessionConfig = Field(default_factory=SessionConfig)

    def identity(self) -> Self:
        """This job with its run folder and the fields of MAY_CHANGE reset to their defaults."""
        fields = type(self).model_fields
        defaults = {
            name: fields[name].get_default(call_default_factory=True)
            for name in MAY_CHANGE
            if name in fields
        }
        return self.model_copy(update={**defaults, "run": "run"})

    @field_validator("run")
    @classmethod
    def _run_is_a_place(cls, run: str) -> str:
        if not run.strip():
            raise ValueError("expected a folder or a URL, got nothing")
        return run.rstrip("/")

    @model_validator(mode="after")
    def _embedded_needs_a_folder(self) -> Self:
        if self.store == "embedded" and "://" in self.run:
            raise ValueError(
                f"store embedded serves a local folder, got run: {self.run}; use store: direct"
            )
        return self


class TrainingJobConfig(JobConfig):
    """Fields of jobs that train on a group of sharded trainers."""

    engine: EngineConfig = Field(default_factory=EngineConfig)
    checkpoints: CheckpointConfig = Field(default_factory=CheckpointConfig)
    trainers: TrainersConfig = Field(default_factory=TrainersConfig)
    lanes: int = Field(
        default=8,
        ge=1,
        description="Fixed data lanes: divisible by the workers, dividing the batches.",
    )

    @model_validator(mode="after")
    def _lanes_fit(self) -> Self:
        if self.lanes % self.trainers.workers:
            fits = [n for n in range(1, self.lanes + 1) if self.lanes % n == 0]
            raise ValueError(
                f"{self.lanes} lanes cannot be divided among {self.trainers.workers} workers; use "
                f"trainers.workers in {fits}"
            )
        return self

    def check_cpus(self, others: float, name: str) -> None:
        """Checks that a private cluster has CPUs left for the workers next to the trainers.

        Args:
            others: CPUs that these workers need.
            name: what they are called in the message.

        Raises:
            ValueError: it has not; names the smallest `session.num_cpus` that works.
        """
        needed = self.trainers.workers * self.trainers.cpus + others
        if self.session.num_cpus < needed:
            raise ValueError(
                f"session.num_cpus: {self.trainers.workers} trainers and {name} next to them need "
                f"{needed:g}, got {self.session.num_cpus}. These are shares, not cores: more than "
                "the machine has are fine"
            )

    def check_batch(self, name: str, batch_size: int) -> None:
        """Checks that a batch is divisible by the lanes.

        Raises:
            ValueError: it is not; names the field and the nearest sizes that are.
        """
        per_lane, rest = divmod(batch_size, self.lanes)
        if rest:
            near = [n * self.lanes for n in (per_lane, per_lane + 1) if n]
            raise ValueError(
                f"{name}: a batch of {batch_size} cannot be divided among {self.lanes} lanes; "
                f"the nearest that work: {near}"
            )
