"""Stages and tasks of a geometric labelling."""

from dataclasses import dataclass
from itertools import chain, product

from pydantic import Field

from dist_tl.cluster.config import Task
from dist_tl.config import StrictModel, fingerprint
from dist_tl.datasets.images import LabelledImages
from dist_tl.datasets.selection import class_index
from dist_tl.datasets.spec import DataConfig
from dist_tl.errors import ConfigError
from dist_tl.jobs.geometric_labels.spec import BASELINE, GeometricLabelsJob
from dist_tl.jobs.plan import PlanTable, TaskRow, plan_table
from dist_tl.jobs.stages import repeat_seed, target_rows, training_stage
from dist_tl.jobs.teacher import teacher_stages
from dist_tl.shards.order import ShardPlan
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.models import ModelSpec, NewNetwork, PretrainedTrunk
from dist_tl.train.objectives import SupervisedSpec
from dist_tl.train.rows import RowsSpec, load_rows
from dist_tl.train.spec import StageSpec

ANCHORS = f"{layout.stage_prefix('anchors')}/points.safetensors"
SHARDS_PER_TASK = 8


class Labelling(StrictModel):
    """Stored labels of the pool: those of an arm, or of a source of the divergence forecast."""

    name: str
    num_samples: int
    num_classes: int
    digest: str = Field(description="Hash of rows and classes; enters the shards' fingerprint.")

    @property
    def key(self) -> str:
        """The key of the stored rows and classes."""
        return f"{layout.stage_prefix(f'labelling-{self.name}')}/labelling.safetensors"


class FeaturesInputs(StrictModel):
    """Inputs of a feature task: a range of rows of a data set."""

    job: GeometricLabelsJob
    data: DataConfig
    first: int
    last: int
    key: str = Field(description="Key of the stored features and their sums by class.")


class LabelsInputs(StrictModel):
    """Inputs of a label task: one chunk of the pool."""

    job: GeometricLabelsJob
    features: str = Field(description="Key of the chunk's features.")
    key: str = Field(description="Key of the stored label tuples by arm.")


class ShardsInputs(StrictModel):
    """Inputs of a shard task: `SHARDS_PER_TASK` shards of labelled pool images."""

    job: GeometricLabelsJob
    labelling: Labelling
    first: int = Field(description="Index of the first shard.")


def plan(job: GeometricLabelsJob, store: ObjectStore) -> "GeometricLabelsPlan":
    """Returns the stages and tasks of a job.

    Raises:
        ConfigError: the data has less than the job needs.
        DataError: the data is damaged.
    """
    for repeat in range(job.seeds):
        load_rows(target_rows(job, job.target, repeat, "train"))
    if job.pairs is not None:
        _check_classes("pairs.sources", job.pairs.sources, job.pool)
        _check_classes("pairs.targets", job.pairs.targets, job.target.data)
    return GeometricLabelsPlan(job)


def _check_classes(field: str, parts: tuple[tuple[str, ...], ...], data: DataConfig) -> None:
    known = load_rows(RowsSpec(data=data)).class_names
    for name in chain.from_iterable(parts):
        try:
            class_index(name, known)
        except ConfigError as error:
            raise ConfigError(f"{field}: {error}") from None


@dataclass(frozen=True)
class GeometricLabelsPlan:
    """Stages and tasks of a job."""

    job: GeometricLabelsJob

    @property
    def pool(self) -> LabelledImages:
        """The images of the pool."""
        return load_rows(RowsSpec(data=self.job.pool))

    def table(self) -> PlanTable:
        """Returns the training stages and the tasks by phase."""
        job, chunks = self.job, len(self.labels())
        rows = (
            TaskRow(phase="features", tasks=chunks, work=f"{len(self.pool)} pool images"),
            TaskRow(phase="labels", tasks=chunks, work=f"m = {job.m}, {len(job.arms) - 1} ways"),
        )
        # An arm's number of classes is known only after labelling; 2 stands in for it.
        labellings = [
            Labelling(name=arm, num_samples=len(self.pool), num_classes=2, digest="")
            for arm in job.arms
            if arm != BASELINE
        ]
        stages = [*self.extractors(), *map(self.base, labellings), *self.arms().values()]
        return plan_table(job, tasks=rows, train=stages)

    def extractors(self) -> list[StageSpec]:
        """Returns the training stage of the extractor; empty if a stored one is used."""
        return teacher_stages(self.job.extractor, seed=self.job.seed)

    @property
    def data_sets(self) -> dict[str, DataConfig]:
        """The data sets whose features are computed, by name."""
        job, data_sets = self.job, {"pool": self.job.pool}
        if job.anchors.data is not None:
            data_sets["anchors"] = job.anchors.data
        if job.pairs is not None:
            data_sets["target"] = job.target.data
        return data_sets

    def features(self, name: str) -> list[Task[FeaturesInputs]]:
        """Returns the feature tasks of a data set, one per chunk."""
        job, data, tasks = self.job.identity(), self.data_sets[name], []
        count, width = len(load_rows(RowsSpec(data=data))), job.rows_per_task
        for part, first in enumerate(range(0, count, width)):
            task, last = f"features-{name}-{part}", min(first + width, count)
            key = f"{layout.stage_prefix(task)}/features.safetensors"
            inputs = FeaturesInputs(job=job, data=data, first=first, last=last, key=key)
            tasks.append(Task(task, inputs))
        return tasks

    def labels(self) -> list[Task[LabelsInputs]]:
        """Returns the label tasks of the pool, one per chunk."""
        job, tasks = self.job.identity(), []
        for part, features in enumerate(self.features("pool")):
            key = f"{layout.stage_prefix(f'labels-{part}')}/tuples.safetensors"
            inputs = LabelsInputs(job=job, features=features.inputs.key, key=key)
            tasks.append(Task(f"labels-{part}", inputs))
        return tasks

    def shard_plan(self, labelling: Labelling) -> ShardPlan:
        """Returns the shards of a labelling."""
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
        """Returns the tasks that write the shards of a labelling."""
        job, tasks = self.job.identity(), []
        starts = range(0, self.shard_plan(labelling).num_shards, SHARDS_PER_TASK)
        for part, first in enumerate(starts):
            inputs = ShardsInputs(job=job, labelling=labelling, first=first)
            tasks.append(Task(f"write-{labelling.name}-{part}", inputs))
        return tasks

    def arms(self) -> dict[tuple[str, float, int], StageSpec]:
        """Returns the fine-tuning stages of all arms, by arm, learning rate and repeat."""
        stages = {}
        for repeat, arm, rate in product(range(self.job.seeds), self.job.arms, self.job.rates):
            base, data = None if arm == BASELINE else arm, self.job.target.data
            stages[arm, rate, repeat] = self.fine_tuning(arm, rate, repeat, base, data)
        return stages

    def base(self, labelling: Labelling) -> StageSpec:
        """Returns the pre-training stage on a labelling."""
        classes = max(2, labelling.num_classes)
        return training_stage(
            self.job,
            self.job.pretraining,
            name=f"base-{labelling.name}",
            seed=self.job.seed,
            model=NewNetwork(network=self.job.network, num_classes=classes),
            objective=SupervisedSpec(),
            image_shape=self.pool.image_shape,
            labelled=self.shard_plan(labelling),
            views=self.job.pool.views,
        )

    def fine_tuning(
        self, name: str, rate: float, repeat: int, base: str | None, data: DataConfig
    ) -> StageSpec:
        """Returns the training stage of one model on the target data or a part of it.

        Args:
            base: name of the labelling whose base model provides the trunk; None: new weights.
        """
        job = self.job
        classes = load_rows(RowsSpec(data=data)).num_classes
        model: ModelSpec = NewNetwork(network=job.network, num_classes=classes)
        if base is not None:
            location = layout.stage_model_prefix(f"base-{base}")
            model = PretrainedTrunk(model=location, num_classes=classes)
        optimizer = job.fine_tuning.optimizer.model_copy(update={"learning_rate": rate})
        return training_stage(
            job,
            job.fine_tuning.model_copy(update={"optimizer": optimizer}),
            name=f"{name}-lr{rate:g}-seed{repeat}",
            seed=repeat_seed(job, repeat),
            model=model,
            objective=SupervisedSpec(),
            image_shape=self.pool.image_shape,
            labelled=target_rows(job, job.target, repeat, "train", data=data),
            views=data.views,
            evaluate=target_rows(job, job.target, repeat, "test", data=data),
        )
