"""What a job of kind `hub` can say: a hub of experts, a target, and the arms to compare.

Imports neither ray nor deepspeed.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dist_tl.cluster.config import TrialsConfig
from dist_tl.config import StrictModel, parse_yaml
from dist_tl.errors import ConfigError
from dist_tl.jobs.spec import (
    NAME,
    BudgetConfig,
    ModelPlace,
    TargetDataConfig,
    TrainingJobConfig,
)
from dist_tl.jobs.teacher import TeacherConfig
from dist_tl.methods.hub.losses import HubLossConfig
from dist_tl.methods.hub.pathway import BatchNorm
from dist_tl.methods.hub.routes import RouteConfig
from dist_tl.models.inputs import InputConfig
from dist_tl.models.networks import NetworkConfig
from dist_tl.train.hub_model import ExpertName

HubRoute = Literal["best_single", "ensemble", "distilled", "pathway"]
BASELINE = "best_single"
# What the names of a run's own stages and tasks begin with; an arm's stages begin with its name.
OWN_STAGES = (
    "expert-",
    "single-",
    "pick-",
    "warm-",
    "features-",
    "rows-",
    "cached-",
    "evaluate-",
)


class ExpertConfig(StrictModel):
    """One pre-trained network of the hub; give exactly one of `model`, `network` and `train`."""

    name: ExpertName = Field(description="Its name in tables and checkpoints.")
    model: ModelPlace | None = Field(
        default=None, description="Folder or URL with model.safetensors and config.json."
    )
    network: NetworkConfig | None = Field(
        default=None, description="A classifier that transformers or timm loads, e.g. by its path."
    )
    train: TeacherConfig | None = Field(
        default=None, description="Train it first, in this run: a stand-in for a downloaded one."
    )
    inputs: InputConfig = Field(
        default_factory=InputConfig, description="What is done to images before it sees them."
    )
    tap: int | None = Field(
        default=None,
        ge=0,
        description="Block whose pooled output is used; absent: the last features.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [key for key in ("model", "network", "train") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"expert {self.name}: expected exactly one of model, network and train, got "
                f"{' and '.join(given) or 'none'}"
            )
        return self


class HubArmConfig(StrictModel):
    """One way of using the hub."""

    name: str = Field(pattern=NAME)
    route: HubRoute = "pathway"
    routes: RouteConfig = Field(default_factory=RouteConfig, description="Route pathway only.")
    loss: HubLossConfig = Field(default_factory=HubLossConfig, description="Route pathway only.")
    first_bias: float = Field(
        default=0.0,
        description="Added to the first expert's logit at the start, to see it recover.",
    )


class TargetConfig(TargetDataConfig):
    """The target task, and how long every arm trains."""

    training: BudgetConfig = Field(description="The same for every arm.")


class WarmStartConfig(StrictModel):
    """Train router, heads and aggregator on cached features first, then everything end to end."""

    training: BudgetConfig
    samples_per_shard: int = Field(
        default=64, ge=1, description="Of the shards of cached features."
    )


class HubJob(TrainingJobConfig):
    """Which few experts of a hub suit which input, learnt from little labelled data."""

    hub: tuple[ExpertConfig, ...] = Field(
        min_length=1, description="The experts in order, or the path of a YAML file of them."
    )
    target: TargetConfig
    seeds: int = Field(default=5, ge=1, description="Repeats with other labels, heads and order.")
    arms: tuple[HubArmConfig, ...] = Field(min_length=1)
    router: NetworkConfig = Field(description="A light network; its trunk is used.")
    expert_batchnorm: BatchNorm = Field(
        default="frozen", description="Running statistics of experts: as they are, or trained."
    )
    validation_folds: int = Field(
        default=4, ge=2, description="One fold of so many picks the best single expert."
    )
    distillation_temperature: float = Field(default=3.0, gt=0)
    warm_start: WarmStartConfig | None = None
    trials: TrialsConfig = Field(default_factory=TrialsConfig, description="How tasks are run.")

    @field_validator("hub", mode="before")
    @classmethod
    def _read_catalogue(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            text = Path(value).read_text()
        except OSError as error:
            raise ValueError(f"cannot read the catalogue {value}: {error.strerror}") from None
        try:
            experts = parse_yaml(text, source=value).get("hub")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if not isinstance(experts, list):
            raise ValueError(f"{value}: expected a list under the key hub")
        return experts

    @field_validator("arms", mode="before")
    @classmethod
    def _short_names(cls, arms: Any) -> Any:
        """`ensemble` stands for an arm of that name and route."""
        if not isinstance(arms, Sequence) or isinstance(arms, str):
            return arms
        return [{"name": arm, "route": arm} if isinstance(arm, str) else arm for arm in arms]

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        for what, names in (
            ("hub: two experts are", [expert.name for expert in self.hub]),
            ("arms: two are", [arm.name for arm in self.arms]),
        ):
            name, count = Counter(names).most_common(1)[0]
            if count > 1:
                raise ValueError(f"{what} called {name}; names must differ")
        for arm in self.arms:
            if arm.name.startswith(OWN_STAGES):
                raise ValueError(
                    f"arm {arm.name}: the run's own stages are called so; use another name"
                )
        return self

    @model_validator(mode="after")
    def _arms_fit_the_hub(self) -> Self:
        for arm in self.arms:
            if arm.route == "pathway" and arm.routes.k > len(self.hub):
                raise ValueError(
                    f"arm {arm.name}: routes.k: expected 1 to {len(self.hub)} (the hub's experts), "
                    f"got {arm.routes.k}"
                )
        self.check_batch("target.training", self.target.training.batch_size)
        if self.warm_start is not None:
            self.check_batch("warm_start.training", self.warm_start.training.batch_size)
        self.check_cpus(self.trials.cpus, "one task")
        if BASELINE not in [arm.name for arm in self.arms]:
            raise ValueError(f"arms: {BASELINE} is what the others are compared with; add it")
        return self
