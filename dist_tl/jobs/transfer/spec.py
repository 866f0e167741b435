"""The specification of a job of kind `transfer`.

The defaults suit real runs; the presets in `launch/presets` are small ones.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

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
# They use what the setting rules out: the source architecture, source data, real target images.
REFERENCES = ("finetune_source", "real_source", "real_unlabelled")
UNLABELLED = ("p_ssl", "pp_p_ssl", "real_unlabelled")  # routes with the P-SSL loss


class TargetConfig(TargetDataConfig):
    """The target task: little labelled data, and an architecture that the user chooses."""

    network: NetworkConfig
    training: BudgetConfig = Field(description="Training from fresh weights.")
    fine_tuning: BudgetConfig | None = Field(
        default=None, description="Training from a pretrained trunk; absent: as `training`."
    )


class SamplesConfig(StrictModel):
    """How many pseudo samples a method draws."""

    key: ClassVar[str]
    mode: Literal["stored", "fresh"] = Field(
        default="stored",
        description="stored: `samples` reused over epochs; fresh: new ones every step.",
    )
    samples: int | None = Field(
        default=None, ge=1, description="Number of pseudo samples; required by mode stored."
    )

    @model_validator(mode="after")
    def _stored_needs_samples(self) -> Self:
        name = f"{self.key}.samples"
        if self.mode == "stored" and self.samples is None:
            raise ValueError(f"{name} is required with mode stored; e.g. samples: 8192")
        if self.mode == "fresh" and self.samples is not None:
            raise ValueError(f"{name} follows from the steps with mode fresh; remove it")
        return self


class PPConfig(SamplesConfig):
    """Pseudo pre-training."""

    key = "pp"
    training: BudgetConfig

    @property
    def num_samples(self) -> int:
        """Number of pseudo samples in the stage; with mode fresh as many as the steps read."""
        return self.samples or self.training.steps * self.training.batch_size


class PSSLArmConfig(SamplesConfig):
    """Pseudo semi-supervised learning: its samples and its loss."""

    key = "p_ssl"
    loss: PSSLConfig = Field(default_factory=PSSLConfig)


class ArmConfig(StrictModel):
    """One way of training a target model."""

    name: str = Field(pattern=NAME, description="Row name in the results table.")
    route: Route
    p_ssl: PSSLArmConfig | None = Field(
        default=None, description="P-SSL settings of this arm; absent: the job's."
    )


class DistillationArmConfig(StrictModel):
    """The distillation baselines; the teacher is the source classifier, fine-tuned."""

    soft_targets: DistillationConfig = Field(default_factory=DistillationConfig)
    logit_matching: DistillationConfig = Field(
        default_factory=lambda: DistillationConfig(kind="logit_matching")
    )
    teacher_training: BudgetConfig | None = Field(
        default=None,
        description="Fine-tuning of the source classifier; absent: as `target.fine_tuning`.",
    )


class TransferJob(TrainingJobConfig):
    """Compares ways of training a target model without source data."""

    seeds: int = Field(
        default=5, ge=1, description="Repeats, each with its own labels, weights and samples."
    )
    source: SourceConfig | SourceAssets = Field(
        description="Locations of `classifier` and `generator`, or the data to train them on."
    )
    target: TargetConfig
    arms: tuple[ArmConfig, ...] = Field(
        description="Routes by name, or mappings with name, route and options."
    )
    pp: PPConfig | None = Field(default=None, description="Required by routes that begin with pp.")
    p_ssl: PSSLArmConfig | None = Field(default=None, description="Required by routes with p_ssl.")
    distillation: DistillationArmConfig = Field(default_factory=DistillationArmConfig)
    generators: GeneratorsConfig = Field(default_factory=GeneratorsConfig)
    trials: TrialsConfig = Field(default_factory=TrialsConfig)
    shards: ShardConfig | None = Field(
        default=None, description="How pseudo samples are packed into shards; absent: defaults."
    )
    sample_batch_size: int = Field(default=256, ge=1, description="Batch size of the generator.")

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
        return tuple({"name": a, "route": a} if isinstance(a, str) else a for a in arms)

    @model_validator(mode="after")
    def _arms_fit(self) -> Self:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"arms: every name once, got {names}")
        routes = {arm.route for arm in self.arms}
        if BASELINE not in names or self.arms[names.index(BASELINE)].route != BASELINE:
            raise ValueError(f"arms: {BASELINE} is what the others are compared with; add it")
        if "real_source" in routes and not isinstance(self.source, SourceConfig):
            raise ValueError("arms: real_source reads source data, and source names trained models")
        if (with_pp := sorted(routes & {"pp", "pp_p_ssl", "real_source"})) and self.pp is None:
            raise ValueError(f"pp: required by the routes {', '.join(with_pp)}, and missing")
        if "pp_p_ssl" in routes and "pp" not in names:
            raise ValueError("arms: pp_p_ssl is judged against pp; add pp")
        for arm in self.arms:
            if arm.route in UNLABELLED and (arm.p_ssl or self.p_ssl) is None:
                raise ValueError(f"p_ssl: required by the arm {arm.name}, and missing")
        return self

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
        if isinstance(self.source, SourceConfig):
            check_source_batches(self, self.source)
        self.check_cpus(max(self.generators.cpus, self.trials.cpus), "a generator or trial")
        self.check_batch("target.training.batch_size", self.target.training.batch_size)
        if (tuning := self.target.fine_tuning) is not None:
            self.check_batch("target.fine_tuning.batch_size", tuning.batch_size)
        if self.pp is not None:
            self.check_batch("pp.training.batch_size", self.pp.training.batch_size)
        if self.shards is not None and self.shards.lanes != self.lanes:
            raise ValueError(
                f"shards.lanes: the job has {self.lanes} lanes, got {self.shards.lanes}; "
                "leave it out"
            )
        return self
