"""The specification of a job of kind `geometric_labels`: pool, anchors, labels, target."""

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from dist_tl.cluster.config import TrialsConfig
from dist_tl.config import StrictModel
from dist_tl.datasets.spec import DataConfig
from dist_tl.jobs.spec import BudgetConfig, TargetDataConfig, TrainingJobConfig
from dist_tl.jobs.teacher import AnyTeacher
from dist_tl.methods.geometry.classes import RareConfig
from dist_tl.methods.geometry.item_labels import LabelConfig
from dist_tl.models.networks import NetworkConfig

Arm = Literal[
    "scratch",
    "g2l_near_max",
    "g2l_near_min",
    "g2l_far_max",
    "g2l_far_min",
    "nearest_m",
    "kmeans",
    "random_labels",
    "human_labels",
]
BASELINE = "scratch"
FACTORS = {"max": "cholesky", "min": "qr"}  # small heights decide where min does


class AnchorsConfig(StrictModel):
    """Source of the anchors: class means of a data set, or items of the pool."""

    data: DataConfig | None = Field(
        default=None, description="Data whose classes each give one anchor, their mean feature."
    )
    count: int | None = Field(
        default=None, ge=1, description="Number of pool items chosen greedily by largest volume."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.data is None) == (self.count is None):
            raise ValueError("anchors: expected either data or count, not both and not neither")
        return self


class PairsConfig(StrictModel):
    """Pairs of a part of the pool and a part of the target, for the divergence forecast."""

    sources: tuple[tuple[str, ...], ...] = Field(min_length=1, description="Classes of the pool.")
    targets: tuple[tuple[str, ...], ...] = Field(min_length=1, description="Classes of the target.")
    seeds: int = Field(default=2, ge=1, description="Fine-tunings per pair.")


class TargetConfig(TargetDataConfig):
    """The target task: little labelled data."""

    test_fraction: float = Field(
        default=0.6, gt=0, lt=1, description="Share set aside for testing before anything else."
    )


class GeometricLabelsJob(TrainingJobConfig):
    """Labels a pool by geometry, pre-trains on it and transfers; compared with other labels."""

    pool: DataConfig = Field(description="Images; human_labels and `pairs` read their labels.")
    extractor: AnyTeacher = Field(description="Network whose last features are used.")
    anchors: AnchorsConfig
    m: int = Field(default=3, ge=1, description="Number of anchors in a label.")
    rare: RareConfig = Field(default_factory=RareConfig)
    arms: tuple[Arm, ...] = get_args(Arm)
    network: NetworkConfig = Field(description="Network of base models and target models.")
    pretraining: BudgetConfig
    target: TargetConfig
    fine_tuning: BudgetConfig = Field(description="Repeated with each learning rate of `rates`.")
    rates: tuple[float, ...] = Field(
        default=(3e-4, 1e-3, 3e-3), min_length=1, description="Each arm is shown at its best rate."
    )
    seeds: int = Field(default=5, ge=1, description="Repeats with new labels, weights and order.")
    pairs: PairsConfig | None = Field(default=None, description="Absent: no divergence forecast.")
    samples_per_shard: int = Field(default=256, ge=1)
    rows_per_task: int = Field(default=1024, ge=1, description="Images per feature or label task.")
    trials: TrialsConfig = Field(default_factory=TrialsConfig, description="Resources of a task.")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms: every one once, got {list(self.arms)}")
        if BASELINE not in self.arms:
            raise ValueError(f"arms: {BASELINE} is what the others are compared with; add it")
        near_max = self.pairs or {"kmeans", "random_labels"} & set(self.arms)
        if near_max and "g2l_near_max" not in self.arms:
            raise ValueError("arms: kmeans, random_labels and pairs need the arm g2l_near_max")
        if getattr(self.pool, "unlabelled", False) and ("human_labels" in self.arms or self.pairs):
            raise ValueError(
                "pool: without labels there are no human_labels and no pairs of classes; leave "
                "that arm and `pairs` out"
            )
        if self.anchors.count is not None and self.m > self.anchors.count:
            raise ValueError(f"m: {self.m} is more than anchors.count, {self.anchors.count}")
        self.check_cpus(self.trials.cpus, "a task")
        self.check_batch("pretraining.batch_size", self.pretraining.batch_size)
        self.check_batch("fine_tuning.batch_size", self.fine_tuning.batch_size)
        return self

    def label_config(self, arm: str) -> LabelConfig:
        """Returns how the arm g2l_START_GROW grows its labels."""
        _, start, grow = arm.split("_")
        starts = {"near": "nearest", "far": "farthest"}
        return LabelConfig.model_validate(
            {"m": self.m, "start": starts[start], "grow": grow, "factor": FACTORS[grow]}
        )

    @property
    def g2l_arms(self) -> list[str]:
        """The arms that label by geometry."""
        return [arm for arm in self.arms if arm.startswith("g2l_")]
