"""What a job of kind `geometric_labels` can say: a pool, features, anchors, labels, a target."""

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
    """Where anchors come from: the mean of each class of some data, or points of the pool."""

    data: DataConfig | None = Field(
        default=None, description="Named source sets: one anchor is the mean feature of each class."
    )
    count: int | None = Field(
        default=None,
        ge=1,
        description="Anchors chosen among the pool's items, greedily of largest volume.",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.data is None) == (self.count is None):
            raise ValueError("anchors: expected either data or count, not both and not neither")
        return self


class PairsConfig(StrictModel):
    """(source, target) pairs for the divergence forecast: parts of the pool and of the target."""

    sources: tuple[tuple[str, ...], ...] = Field(
        min_length=1, description="Classes of the pool that make each source."
    )
    targets: tuple[tuple[str, ...], ...] = Field(
        min_length=1, description="Classes of the target data that make each target."
    )
    seeds: int = Field(default=2, ge=1, description="Fine-tunings of each pair.")


class TargetConfig(TargetDataConfig):
    """The target task: little labelled data."""

    test_fraction: float = Field(
        default=0.6, gt=0, lt=1, description="Share set aside for testing before anything else."
    )


class GeometricLabelsJob(TrainingJobConfig):
    """Label a pool by geometry, pre-train on it, transfer; against labels made in other ways."""

    pool: DataConfig = Field(description="Unlabelled images; human_labels alone reads its labels.")
    extractor: AnyTeacher = Field(description="Its last features are used.")
    anchors: AnchorsConfig
    m: int = Field(default=3, ge=1, description="Anchors in a label.")
    rare: RareConfig = Field(default_factory=RareConfig)
    arms: tuple[Arm, ...] = get_args(Arm)
    network: NetworkConfig = Field(description="Of the base model and of the target.")
    pretraining: BudgetConfig
    target: TargetConfig
    fine_tuning: BudgetConfig = Field(description="Its learning rate is swept over `rates`.")
    rates: tuple[float, ...] = Field(
        default=(3e-4, 1e-3, 3e-3),
        min_length=1,
        description="Learning rates; every arm gets its best.",
    )
    seeds: int = Field(
        default=5, ge=1, description="Repeats: labels, weights and order drawn anew."
    )
    pairs: PairsConfig | None = Field(default=None, description="For the divergence forecast.")
    samples_per_shard: int = Field(default=256, ge=1)
    rows_per_task: int = Field(
        default=1024, ge=1, description="Images of one feature or label task."
    )
    trials: TrialsConfig = Field(default_factory=TrialsConfig, description="How tasks are run.")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms: every one once, got {list(self.arms)}")
        if BASELINE not in self.arms:
            raise ValueError(f"arms: {BASELINE} is what the others are compared with; add it")
        if {"kmeans", "random_labels"} & set(self.arms) and "g2l_near_max" not in self.arms:
            raise ValueError("arms: kmeans and random_labels take their classes from g2l_near_max")
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
        """How an arm g2l_START_GROW grows its labels."""
        _, start, grow = arm.split("_")
        starts = {"near": "nearest", "far": "farthest"}
        return LabelConfig(m=self.m, start=starts[start], grow=grow, factor=FACTORS[grow])

    @property
    def g2l_arms(self) -> list[str]:
        """The arms that label by geometry."""
        return [arm for arm in self.arms if arm.startswith("g2l_")]
