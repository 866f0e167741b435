"""The tasks and stages of a geometric labelling, from its file, its data and its labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from dist_tl.cluster.config import Task
from dist_tl.config import fingerprint
from dist_tl.datasets.spec import DataConfig
from dist_tl.datasets.views import ViewsConfig
from dist_tl.jobs.geometric_labels.spec import BASELINE, GeometricLabelsJob
from dist_tl.jobs.geometric_labels.tasks import FeaturesInputs, LabelsInputs, ShardsInputs
from dist_tl.jobs.plan import PlanTable, TaskRow, plan_table
from dist_tl.jobs.spec import BudgetConfig
from dist_tl.jobs.stages import Part, repeat_seed, target_rows, training_stage
from dist_tl.jobs.teacher import teacher_location, teacher_stages
from dist_tl.shards.order import ShardPlan
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.models import ModelSpec, NewNetwork, PretrainedTrunk
from dist_tl.train.objectives import SupervisedSpec
from dist_tl.train.rows import RowsSpec, load_rows
from dist_tl.train.spec import StageSpec

ANCHORS = f"{layout.stage_prefix('anchors')}/points.safetensors"
SHARDS_PER_TASK = 8


@dataclass(frozen=True)
class Labelling:
    """Labels of the pool by one way: what is learnt from.

    Attributes:
        name: of the arm, or of a source of the divergence forecast.
        key: where rows and classes are stored.
        digest: of both; part of the shards' fingerprint.
    """

    name: str
    num_samples: int
    num_classes: int
    key: str
    digest: str


def plan(job: GeometricLabelsJob, store: ObjectStore) -> "GeometricLabelsPlan":
    """The stages and tasks of a job.

    Raises:
        ConfigError: the data cannot give what the job needs.
        DataError: the data is damaged.
    """
    plan = GeometricLabelsPlan(job)
    for repeat in range(job.seeds):
        load_rows(plan.rows(repeat, "train"))
    return plan


@dataclass(frozen=True)
class GeometricLabelsPlan:
    """Names, tasks and stages of a job."""

    job: GeometricLabelsJob

    @cached_property
    def pool_size(self) -> int:
        """Number of images in the pool."""
        return len(load_rows(RowsSpec(data=self.job.pool)))

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the pool's images."""
        return load_rows(RowsSpec(data=self.job.pool)).image_shape

    def table(self) -> PlanTable:
        """Trainings, and tasks by phase."""
        job, chunks = self.job, len(self.features("pool", self.job.pool))
        rows = (
            TaskRow(phase="features", tasks=chunks, work=f"{self.pool_size} pool images"),
            TaskRow(phase="labels", tasks=chunks, work=f"m = {job.m}, {len(job.arms) - 1} ways"),
        )
        # The number of classes of an arm is known once the pool is labelled; 2 stands in for it.
        labellings = [
            Labelling(arm, self.pool_size, 2, "", "") for arm in job.arms if arm != BASELINE
        ]
        stages = [
            *self.extractors(),
            *map(self.base, labellings),
            *(self.arm(*key) for key in self.arm_keys()),
        ]
        return plan_table(job, tasks=rows, train=stages)

    def extractors(self) -> list[StageSpec]:
        """The training of the extractor, if the job trains one."""
        return teacher_stages(self.job.extractor, seed=self.job.seed)

    def arm_keys(self) -> list[tuple[str, float, int]]:
        """Arm, learning rate and repeat of every fine-tuning."""
        return [
            (arm, rate, repeat)
            for repeat in range(self.job.seeds)
            for arm in self.job.arms
            for rate in self.job.rates
        ]

    def arm(self, arm: str, rate: float, repeat: int) -> StageSpec:
        """The fine-tuning of one arm."""
        return self.fine_tuning(arm, repeat, rate, base=None if arm == BASELINE else arm)

    def features(self, name: str, data: DataConfig) -> list[Task[FeaturesInputs]]:
        """Features of a data set, in chunks."""
        count, width = len(load_rows(RowsSpec(data=data))), self.job.rows_per_task
        place = teacher_location(self.job.extractor)
        return [
            Task(
                f"features-{name}-{part}",
                FeaturesInputs(
                    model=place,
                    data=data,
                    first=first,
                    last=min(first + width, count),
                    key=f"{layout.stage_prefix(f'features-{name}-{part}')}/features.safetensors",
                ),
            )
            for part, first in enumerate(range(0, count, width))
        ]

    def labels(self) -> list[Task[LabelsInputs]]:
        """Label tuples of the pool, in chunks."""
        job = self.job
        return [
            Task(
                f"labels-{part}",
                LabelsInputs(
                    features=task.inputs.key,
                    anchors=ANCHORS,
                    ways={arm: job.label_config(arm) for arm in job.g2l_arms},
                    nearest=job.m if "nearest_m" in job.arms else None,
                    key=f"{layout.stage_prefix(f'labels-{part}')}/tuples.safetensors",
                ),
            )
            for part, task in enumerate(self.features("pool", job.pool))
        ]

    def shard_plan(self, labelling: Labelling) -> ShardPlan:
        """The shards of one labelling."""
        stage = f"shards-{labelling.name}"
        content = {"pool": self.job.pool.model_dump(mode="json"), "labels": labelling.digest}
        return ShardPlan(
            stage=stage,
            fingerprint=fingerprint(content),
            purpose=stage,
            seed=self.job.seed,
            num_samples=labelling.num_samples,
            samples_per_shard=self.job.samples_per_shard,
            lanes=self.job.lanes,
            window=1,
        )

    def shards(self, labelling: Labelling) -> list[Task[ShardsInputs]]:
        """Tasks that write them."""
        plan = self.shard_plan(labelling)
        starts = range(0, plan.num_shards, SHARDS_PER_TASK)
        return [
            Task(
                f"write-{labelling.name}-{part}",
                ShardsInputs(
                    plan=plan,
                    pool=self.job.pool,
                    labelling=labelling.key,
                    indices=tuple(range(first, min(first + SHARDS_PER_TASK, plan.num_shards))),
                ),
            )
            for part, first in enumerate(starts)
        ]

    def base(self, labelling: Labelling) -> StageSpec:
        """Pre-training on one labelling."""
        model = NewNetwork(network=self.job.network, num_classes=max(2, labelling.num_classes))
        return self._stage(
            f"base-{labelling.name}",
            self.job.seed,
            model,
            self.shard_plan(labelling),
            self.job.pool.views,
            self.job.pretraining,
        )

    def fine_tuning(
        self,
        name: str,
        repeat: int,
        rate: float,
        *,
        base: str | None,
        data: DataConfig | None = None,
    ) -> StageSpec:
        """One model on the target: from a base model's trunk, or from fresh weights.

        Args:
            base: the name of the labelling whose base model is handed over.
            data: a part of the target data; absent: all of it.
        """
        data = data or self.job.target.data
        classes = load_rows(RowsSpec(data=data)).num_classes
        model: ModelSpec = NewNetwork(network=self.job.network, num_classes=classes)
        if base is not None:
            place = layout.stage_model_prefix(f"base-{base}")
            model = PretrainedTrunk(model=place, num_classes=classes)
        budget = self.job.fine_tuning
        swept = budget.optimizer.model_copy(update={"learning_rate": rate})
        stage = self._stage(
            f"{name}-lr{rate:g}-seed{repeat}",
            repeat_seed(self.job, repeat),
            model,
            self.rows(repeat, "train", data),
            data.views,
            budget.model_copy(update={"optimizer": swept}),
        )
        return stage.model_copy(update={"evaluate": self.rows(repeat, "test", data)})

    def rows(self, repeat: int, part: Part, data: DataConfig | None = None) -> RowsSpec:
        """A part of the target data, or of the data given."""
        return target_rows(self.job, self.job.target, repeat, part, data=data)

    def _stage(
        self,
        name: str,
        seed: int,
        model: ModelSpec,
        labelled: RowsSpec | ShardPlan,
        views: ViewsConfig,
        budget: BudgetConfig,
    ) -> StageSpec:
        return training_stage(
            self.job,
            budget,
            name=name,
            seed=seed,
            model=model,
            objective=SupervisedSpec(),
            image_shape=self.image_shape,
            labelled=labelled,
            views=views,
        )


def of_classes(data: DataConfig, classes: Sequence[str]) -> DataConfig:
    """The same data with some of its classes."""
    return data.model_copy(update={"classes": tuple(classes)})
