"""The specification of a job of kind `transfer`.

Every default is a sane choice for a real run; the presets in `launch/presets` show small ones.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dist_tl.cluster.config import GeneratorsConfig, TrialsConfig
from dist_tl.config import StrictModel
from dist_tl.jobs.source.spec import SourceAssets, SourceConfig, check_source_batches
from dist_tl.jobs.spec import NAME, BudgetConfig, TargetDataConfig, TrainingJobConfig
from dist_tl.methods.pseudo.distillation import DistillationConfig
from dist_tl.methods.pseudo.p_ssl import PSSLConfig
from dist_tl.models.networks import NetworkConfig
from dist_tl.shards.writer import ShardConfig

Route = Literal[
    "scratch",
    "distillation",
    "logit_matching",
    "pp",
    "p_ssl",
    "pp_p_ssl",
    "finetune_source",
    "real_source",
    "real_unlabelled",
]
BASELINE = "scratch"
# These use what the setting withholds: equal architectures, source data, or real target images.
REFERENCES = ("finetune_source", "real_source", "real_unlabelled")


class TargetConfig(TargetDataConfig):
    """The target task: little labelled data, and an architecture of the user's choosing."""

    network: NetworkConfig
    training: BudgetConfig = Field(description="Of arms that start from fresh weights.")
    fine_tuning: BudgetConfig | None = Field(
        default=None, description="Of arms that start from a trained trunk; absent: as `training`."
    )


class PPConfig(StrictModel):
    """Pseudo pre-training."""

    mode: Literal["stored", "fresh"] = Field(
        default="stored",
        description="stored: `samples` reused over epochs; fresh: new ones every step.",
    )
    samples: int | None = Field(
        default=None, ge=1, description="Pseudo samples; mode stored needs it."
    )
    training: BudgetConfig

    @model_validator(mode="after")
    def _stored_needs_samples(self) -> Self:
        return _check_samples(self, "pp")

    @property
    def num_samples(self) -> int:
        """Pseudo samples of the stage: as many as the steps consume, if always fresh."""
        return self.samples or self.training.steps * self.training.batch_size


class PSSLArmConfig(StrictModel):
    """Pseudo semi-supervised learning: its loss, and the samples it draws."""

    mode: Literal["stored", "fresh"] = Field(
        default="stored",
        description="stored: `samples` reused over epochs; fresh: new ones every step.",
    )
    samples: int | None = Field(
        default=None, ge=1, description="Pseudo samples; mode stored needs it."
    )
    loss: PSSLConfig = Field(default_factory=PSSLConfig)

    @model_validator(mode="after")
    def _stored_needs_samples(self) -> Self:
        return _check_samples(self, "p_ssl")


def _check_samples(config: Any, name: str) -> Any:
    if config.mode == "stored" and config.samples is None:
        raise ValueError(f"{name}.samples is required with mode stored; e.g. samples: 8192")
    if config.mode == "fresh" and config.samples is not None:
        raise ValueError(f"{name}.samples follows from the steps with mode fresh; remove it")
    return config


class ArmConfig(StrictModel):
    """One way of getting a target model."""

    name: str = Field(pattern=NAME, description="Of the row in the table.")
    route: Route
    p_ssl: PSSLArmConfig | None = Field(
        default=None, description="Instead of the job's, for this arm."
    )


class DistillationArmConfig(StrictModel):
    """The distillation baselines; the teacher is the source classifier, fine-tuned."""

    soft_targets: DistillationConfig = Field(default_factory=DistillationConfig)
    logit_matching: DistillationConfig = Field(
        default_factory=lambda: DistillationConfig(kind="logit_matching")
    )
    teacher_training: BudgetConfig | None = Field(
        default=None,
        description="Fine-tuning of the source classifier; absent: as other fine-tuning.",
    )


class TransferJob(TrainingJobConfig):
    """Compare ways of getting a target model without source data."""

    seeds: int = Field(
        default=5, ge=1, description="Repeats: labels, weights and samples drawn anew."
    )
    source: SourceConfig | SourceAssets = Field(
        description="`classifier` and `generator` that exist, or what to train them from."
    )
    target: TargetConfig
    arms: tuple[ArmConfig, ...] = Field(
        description="Names of routes, or mappings with name, route and options."
    )
    pp: PPConfig | None = Field(default=None, description="Required by routes that begin with pp.")
    p_ssl: PSSLArmConfig | None = Field(default=None, description="Required by routes with p_ssl.")
    distillation: DistillationArmConfig = Field(default_factory=DistillationArmConfig)
    generators: GeneratorsConfig = Field(default_factory=GeneratorsConfig)
    trials: TrialsConfig = Field(default_factory=TrialsConfig)
    shards: ShardConfig | None = Field(
        default=None,
        description="How pseudo samples are packed; absent: defaults, with the job's lanes.",
    )
    sample_batch_size: int = Field(
        default=256, ge=1, description="Rows the generator sees at once."
    )

    @field_validator("source", mode="before")
    @classmethod
    def _one_kind_of_source(cls, source: Any) -> Any:
        # A union's errors name every member; choosing first keeps the message to the point.
        if isinstance(source, Mapping):
            return (SourceConfig if "data" in source else SourceAssets).model_validate(source)
        return source

    @field_validator("arms", mode="before")
    @classmethod
    def _names_are_routes(cls, arms: Any) -> Any:
        if not isinstance(arms, Sequence) or isinstance(arms, str):
            return arms
        named = [{"name": a, "route": a} if isinstance(a, str) else a for a in arms]
        return tuple(named)

    @model_validator(mode="after")
    def _arms_fit(self) -> Self:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"arms: every name once, got {names}")
        routes = {arm.route for arm in self.arms}
        if BASELINE not in names or self.arms[names.index(BASELINE)].route != BASELINE:
            raise ValueError(f"arms: {BASELINE} is what the others are compared with; add it")
        if routes & {"pp", "pp_p_ssl"} and self.pp is None:
            raise ValueError("pp: required by the routes pp and pp_p_ssl, and missing")
        if "pp_p_ssl" in routes and "pp" not in names:
            raise ValueError("arms: pp_p_ssl is judged against pp; add pp")
        for arm in self.arms:
            if "p_ssl" in arm.route and (arm.p_ssl or self.p_ssl) is None:
                raise ValueError(f"p_ssl: required by the arm {arm.name}, and missing")
        if "real_unlabelled" in routes and self.p_ssl is None:
            raise ValueError("p_ssl: required by the route real_unlabelled, and missing")
        if "real_source" in routes and not isinstance(self.source, SourceConfig):
            raise ValueError("arms: real_source needs source data; it exists in a trained source")
        if "real_source" in routes and self.pp is None:
            raise ValueError("pp: its budget is used by real_source too; it is missing")
        return self

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
        if isinstance(self.source, SourceConfig):
            check_source_batches(self, self.source)
        self.check_cpus(max(self.generators.cpus, self.trials.cpus), "a generator or trial")
        self.check_batch("target.training.batch_size", self.target.training.batch_size)
        if self.target.fine_tuning is not None:
            batch_size = self.target.fine_tuning.batch_size
            self.check_batch("target.fine_tuning.batch_size", batch_size)
        if self.pp is not None:
            self.check_batch("pp.training.batch_size", self.pp.training.batch_size)
        if self.shards is not None and self.shards.lanes != self.lanes:
            raise ValueError(
                f"shards.lanes: the job has {self.lanes} lanes, got {self.shards.lanes}; "
                "leave it out"
            )
        return self

    @property
    def packing(self) -> ShardConfig:
        """How pseudo samples are packed."""
        return self.shards or ShardConfig(lanes=self.lanes)
