"""The tasks and stages of a geometric labelling, from its file, its data and its labels."""

from collections.abc import Sequence
from dataclasses import dataclass

from dist_tl.cluster.config import Task
from dist_tl.config import fingerprint
from dist_tl.datasets.spec import DataConfig
from dist_tl.datasets.views import ViewsConfig
from dist_tl.jobs.geometric_labels.spec import GeometricLabelsJob
from dist_tl.jobs.geometric_labels.tasks import FeaturesInputs, LabelsInputs, ShardsInputs
from dist_tl.jobs.spec import BudgetConfig
from dist_tl.jobs.teacher import teacher_place
from dist_tl.seeds import derive_seed
from dist_tl.shards.order import ShardPlan
from dist_tl.storage import layout
from dist_tl.train.models import ModelSpec, NewNetwork, PretrainedTrunk
from dist_tl.train.objectives import SupervisedSpec
from dist_tl.train.rows import RowsSpec, SplitSpec, load_rows
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


class GeometryPlan:
    """Names, tasks and stages.

    Raises:
        ConfigError: the data cannot give what the job asks for.
        DataError: it is damaged.
    """

    def __init__(self, job: GeometricLabelsJob) -> None:
        self.job = job
        pool, target = load_rows(RowsSpec(data=job.pool)), load_rows(RowsSpec(data=job.target.data))
        self.pool_size, self.image_shape = len(pool), pool.image_shape
        self.num_classes = target.num_classes
        for repeat in range(job.seeds):
            load_rows(self.rows(job.target.data, repeat, "train"))

    def features(self, name: str, data: DataConfig) -> list[Task[FeaturesInputs]]:
        """Features of a data set, in chunks."""
        count, width = len(load_rows(RowsSpec(data=data))), self.job.rows_per_task
        place = teacher_place(self.job.extractor)
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
            self.repeat_seed(repeat),
            model,
            self.rows(data, repeat, "train"),
            data.views,
            budget.model_copy(update={"optimizer": swept}),
        )
        return stage.model_copy(update={"evaluate": self.rows(data, repeat, "test")})

    def rows(self, data: DataConfig, repeat: int, part: str) -> RowsSpec:
        """A part of the target data."""
        target = self.job.target
        split = SplitSpec(
            labels_per_class=target.labels_per_class,
            test_fraction=target.test_fraction,
            data_seed=self.job.seed,
            draw_seed=self.repeat_seed(repeat),
            part=part,
        )
        return RowsSpec(data=data, split=split)

    def repeat_seed(self, repeat: int) -> int:
        """Fixes labels, weights and order of one repeat."""
        return derive_seed(self.job.seed, "repeat", repeat)

    def _stage(
        self,
        name: str,
        seed: int,
        model: ModelSpec,
        labelled: RowsSpec | ShardPlan,
        views: ViewsConfig,
        budget: BudgetConfig,
    ) -> StageSpec:
        job = self.job
        return StageSpec(
            name=name,
            seed=seed,
            model=model,
            objective=SupervisedSpec(),
            image_shape=self.image_shape,
            labelled=labelled,
            views=views,
            steps=budget.steps,
            batch_size=budget.batch_size,
            lanes=job.lanes,
            optimizer=budget.optimizer,
            engine=job.engine,
            checkpoints=job.checkpoints,
        )


def of_classes(data: DataConfig, classes: Sequence[str]) -> DataConfig:
    """The same data with some of its classes."""
    return data.model_copy(update={"classes": tuple(classes)})
