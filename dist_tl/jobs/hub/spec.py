"""The specification of a job of kind `hub`: experts, a target task, and the arms to compare.

Imports neither ray nor deepspeed.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dist_tl.cluster.config import TrialsConfig
from dist_tl.config import StrictModel, read_yaml
from dist_tl.errors import ConfigError
from dist_tl.jobs.spec import NAME, BudgetConfig, ModelPlace, TargetDataConfig, TrainingJobConfig
from dist_tl.jobs.teacher import TeacherConfig
from dist_tl.methods.hub.losses import HubLossConfig
from dist_tl.methods.hub.pathway import BatchNorm
from dist_tl.methods.hub.routes import RouteConfig
from dist_tl.models.networks import NetworkConfig
from dist_tl.storage import layout
from dist_tl.train.hub_model import ExpertSource

HubRoute = Literal["best_single", "ensemble", "distilled", "pathway"]
BASELINE = "best_single"
# Reserved prefixes: stages and tasks of the run. The stages of an arm start with its name.
RESERVED = ("expert-", "single-", "pick-", "warm-", "features-", "rows-", "cached-", "evaluate-")


class ExpertConfig(ExpertSource):
    """A pretrained network of the hub; give exactly one of `model`, `network` and `train`."""

    model: ModelPlace | None = Field(
        default=None, description="Folder or URL with model.safetensors and config.json."
    )
    network: NetworkConfig | None = Field(
        default=None, description="A classifier that transformers or timm loads, e.g. by its path."
    )
    train: TeacherConfig | None = Field(
        default=None, description="Train the expert first, in this run, instead of downloading one."
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

    def source(self) -> ExpertSource:
        """Returns the location of the pretrained network, in this run or elsewhere."""
        fields = {name: value for name, value in self if name != "train"}
        if self.train is not None:
            fields["model"] = layout.stage_model_prefix(f"expert-{self.name}")
        return ExpertSource(**fields)


class HubArmConfig(StrictModel):
    """An arm: one way to use the hub."""

    name: str = Field(pattern=NAME)
    route: HubRoute = "pathway"
    routes: RouteConfig = Field(default_factory=RouteConfig, description="For route pathway only.")
    loss: HubLossConfig = Field(
        default_factory=HubLossConfig, description="For route pathway only."
    )
    first_bias: float = Field(
        default=0.0, description="Initial bias of the first expert's logit, to see it vanish."
    )


class TargetConfig(TargetDataConfig):
    """The target task, and the training budget of every arm."""

    training: BudgetConfig = Field(description="Budget of every arm.")


class WarmStartConfig(StrictModel):
    """Trains router, heads and aggregator on cached features before training end to end."""

    training: BudgetConfig
    samples_per_shard: int = Field(default=64, ge=1, description="Rows per shard of features.")


class HubJob(TrainingJobConfig):
    """Learns from little labelled data which few experts of a hub to use for which input."""

    hub: tuple[ExpertConfig, ...] = Field(
        min_length=1, description="The experts in order, or the path of a YAML file of them."
    )
    target: TargetConfig
    seeds: int = Field(
        default=5, ge=1, description="Repeats with other labels, heads and data order."
    )
    arms: tuple[HubArmConfig, ...] = Field(min_length=1)
    router: NetworkConfig = Field(description="A small network; the router uses its trunk.")
    expert_batchnorm: BatchNorm = Field(
        default="frozen", description="Keep or train the running statistics of the experts."
    )
    validation_folds: int = Field(
        default=4, ge=2, description="Folds; one of them selects the best single expert."
    )
    distillation_temperature: float = Field(default=3.0, gt=0)
    warm_start: WarmStartConfig | None = None
    trials: TrialsConfig = Field(default_factory=TrialsConfig, description="Resources of tasks.")

    @field_validator("hub", mode="before")
    @classmethod
    def _read_catalogue(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            experts = read_yaml(value, name="catalogue").get("hub")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if not isinstance(experts, list):
            raise ValueError(f"{value}: expected a list under the key hub")
        return experts

    @field_validator("arms", mode="before")
    @classmethod
    def _short_names(cls, arms: Any) -> Any:
        """Expands `ensemble` to an arm of that name and route."""
        if not isinstance(arms, Sequence) or isinstance(arms, str):
            return arms
        return [{"name": arm, "route": arm} if isinstance(arm, str) else arm for arm in arms]

    @model_validator(mode="after")
    def _job_is_consistent(self) -> Self:
        for subject, items in (("hub: two experts", self.hub), ("arms: two", self.arms)):
            name, count = Counter(item.name for item in items).most_common(1)[0]
            if count > 1:
                raise ValueError(f"{subject} are called {name}; names must differ")
        for arm in self.arms:
            if arm.name.startswith(RESERVED):
                raise ValueError(
                    f"arm {arm.name}: stages of the run start with this prefix; use another name"
                )
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
            raise ValueError(f"arms: add {BASELINE}, the baseline of all comparisons")
        return self

    def pathways(self) -> list[HubArmConfig]:
        """Returns the arms that route samples through the hub."""
        return [arm for arm in self.arms if arm.route == "pathway"]
