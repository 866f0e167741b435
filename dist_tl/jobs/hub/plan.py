"""Plans a hub job: experts, rows, training stages, warm starts and tasks."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pydantic import Field

from dist_tl.cluster.config import Task
from dist_tl.config import StrictModel, fingerprint
from dist_tl.datasets.images import LabelledImages
from dist_tl.datasets.views import ViewsConfig
from dist_tl.errors import ConfigError, DataError
from dist_tl.jobs.hub.cost import cost_table, hub_rows
from dist_tl.jobs.hub.spec import HubArmConfig, HubJob, WarmStartConfig
from dist_tl.jobs.plan import PlanTable, TaskRow, plan_table
from dist_tl.jobs.stages import repeat_seed, target_rows, training_stage
from dist_tl.jobs.teacher import TeacherConfig, teacher_stage
from dist_tl.jobs.versions import versions
from dist_tl.methods.pseudo.distillation import DistillationConfig
from dist_tl.models.networks import Network
from dist_tl.seeds import derive_seed
from dist_tl.shards.manifest import StageManifest
from dist_tl.shards.order import ShardPlan
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.cached import CachedExpert, CachedFeatures, CachedHub
from dist_tl.train.hub_model import ExpertSource, NewExpert, NewHub, build_expert
from dist_tl.train.models import ModelSpec
from dist_tl.train.objectives import DistillationSpec, HubSpec, ObjectiveSpec, SupervisedSpec
from dist_tl.train.rows import FoldSpec, RowsSpec, load_rows
from dist_tl.train.spec import StageSpec

# "pick": the labelled images except one fold, which is "validation".
Rows = Literal["train", "test", "pick", "validation"]
# Stages of a single expert and their rows: fine-tuned for the results, or to select the best one.
USES: tuple[tuple[str, Rows], ...] = (("single", "train"), ("pick", "pick"))


class TaskInputs(StrictModel):
    """Inputs of every task."""

    job: HubJob = Field(description="Identity of the job.")


class FeaturesInputs(TaskInputs):
    """The expert that computes features of all rows to cache."""

    expert: ExpertSource


class RowsInputs(TaskInputs):
    """The rows to store as shards, with the features of all experts."""

    rows: str = Field(description="Name of the rows, e.g. train-seed0.")


class EvaluateInputs(TaskInputs):
    """The arm to evaluate on the test split."""

    arm: HubArmConfig
    repeat: int


class TimeInputs(TaskInputs):
    """All arms are timed, one after another in one process."""

    best: str = Field(description="The single expert that validation selects.")


def plan(job: HubJob, store: ObjectStore) -> "HubPlan":
    """Checks the job against its data and its experts.

    Raises:
        ConfigError: data or an expert does not fit; names the expert and both image shapes.
        DataError: data is damaged.
    """
    plan = HubPlan(job, store)
    load_rows(plan.rows(0, "train"))
    load_rows(plan.rows(0, "validation"))
    assert plan.experts, "building the experts checks them"
    return plan


@dataclass(frozen=True)
class HubPlan:
    """All stages and tasks of a job.

    Attributes:
        store: object store of the run.
    """

    job: HubJob
    store: ObjectStore

    @cached_property
    def target(self) -> LabelledImages:
        """The target data, test split included."""
        return load_rows(RowsSpec(data=self.job.target.data))

    def rows(self, repeat: int, part: Rows) -> RowsSpec:
        """Returns a part of the target data in one repeat."""
        if part in ("train", "test"):
            return target_rows(self.job, self.job.target, repeat, part)
        fold = FoldSpec(
            index=0,
            count=self.job.validation_folds,
            seed=repeat_seed(self.job, repeat),
            held_out=part == "validation",
        )
        return target_rows(self.job, self.job.target, repeat, "train", fold=fold)

    # Experts.

    @cached_property
    def experts(self) -> dict[str, Network]:
        """All experts under fresh heads, by name; experts to be trained have random weights.

        Raises:
            ConfigError: an expert is missing, or does not fit the target's images.
            DataError: the data of an expert is damaged.
        """
        return {
            source.name: self.build(
                self._untrained(source, expert.train) if expert.train else source
            )
            for source, expert in zip(self.sources, self.job.hub, strict=True)
        }

    @property
    def sources(self) -> tuple[ExpertSource, ...]:
        """Locations of the pretrained experts."""
        return tuple(expert.source() for expert in self.job.hub)

    def build(self, source: ExpertSource) -> Network:
        """Loads an expert under a fresh head."""
        return build_expert(
            source,
            self.store,
            num_classes=self.target.num_classes,
            image_shape=self.target.image_shape,
            seed=0,
        )

    def _untrained(self, source: ExpertSource, train: TeacherConfig) -> ExpertSource:
        try:
            shape = load_rows(RowsSpec(data=train.data)).image_shape
            adapted = source.inputs.adapted_shape(self.target.image_shape)
        except (ConfigError, DataError) as error:
            raise type(error)(f"expert {source.name}: {error}") from None
        if adapted != shape:
            raise ConfigError(
                f"expert {source.name}: it is trained on images of (channels, height, width) "
                f"{shape}, but receives {adapted}; set its inputs, or its data's size"
            )
        return source.model_copy(update={"model": None, "network": train.network})

    # Training stages.

    def pretraining(self) -> list[StageSpec]:
        """Returns the trainings of experts, one worker each."""
        return [
            teacher_stage(
                expert.train,
                seed=derive_seed(self.job.seed, expert.name),
                name=f"expert-{expert.name}",
            )
            for expert in self.job.hub
            if expert.train is not None
        ]

    def singles(self, repeat: int, *, pick: bool = False) -> list[StageSpec]:
        """Returns the fine-tuning of every expert on the labelled images.

        Args:
            pick: on all except one fold, whose accuracy selects the best single expert.
        """
        use, rows = USES[pick]
        stages, num_classes = [], self.target.num_classes
        for source in self.sources:
            name = f"{use}-{source.name}-seed{repeat}"
            model = NewExpert(expert=source, num_classes=num_classes, warm=self._warm_model(name))
            stages.append(self._stage(name, repeat, model, rows=rows))
        return stages

    def arms(self, repeat: int, *, best: str) -> list[StageSpec]:
        """Returns the trainings of hubs and distilled students.

        Args:
            best: the single expert that validation selects; distilled students start from it.
        """
        config = DistillationConfig(temperature=self.job.distillation_temperature)
        singles = {spec.name: spec for spec in self.singles(repeat)}
        teachers = tuple(map(layout.stage_model_prefix, singles))
        distillation = DistillationSpec(distillation=config, teacher=teachers)
        student = singles[f"single-{best}-seed{repeat}"].model
        stages = []
        for arm in self.job.arms:
            name = f"{arm.name}-seed{repeat}"
            if arm.route == "pathway":
                hub, objective = self.hub(arm, repeat), HubSpec(loss=arm.loss)
                stages.append(self._stage(name, repeat, hub, objective))
            elif arm.route == "distilled":
                stages.append(self._stage(name, repeat, student, distillation))
        return stages

    def hub(self, arm: HubArmConfig, repeat: int) -> NewHub:
        """Returns the initial model of an arm that routes."""
        return NewHub(
            experts=self.sources,
            router=self.job.router,
            routes=arm.routes,
            batchnorm=self.job.expert_batchnorm,
            first_bias=arm.first_bias,
            warm=self._warm_model(f"{arm.name}-seed{repeat}"),
            num_classes=self.target.num_classes,
        )

    def _warm_model(self, stage: str) -> str | None:
        return layout.stage_model_prefix(f"warm-{stage}") if self.job.warm_start else None

    def _stage(
        self,
        name: str,
        repeat: int,
        model: ModelSpec,
        objective: ObjectiveSpec | None = None,
        *,
        rows: Rows = "train",
        warm: WarmStartConfig | None = None,
    ) -> StageSpec:
        target, scored = self.job.target, "validation" if rows == "pick" else "test"
        return training_stage(
            self.job,
            (warm or target).training,
            name=f"warm-{name}" if warm else name,
            seed=repeat_seed(self.job, repeat),
            model=model,
            objective=objective or SupervisedSpec(),
            image_shape=self._row_shape if warm else self.target.image_shape,
            labelled=self.shards(f"{rows}-seed{repeat}") if warm else self.rows(repeat, rows),
            views=ViewsConfig(kind="none") if warm else target.data.views,
            evaluate=None if warm else self.rows(repeat, scored),
        )

    # Warm starts on cached features.

    def cached_rows(self) -> dict[str, RowsSpec]:
        """Returns the rows to cache, by name; none without a warm start."""
        return {
            f"{part}-seed{repeat}": self.rows(repeat, part)
            for repeat in range(self.job.seeds if self.job.warm_start else 0)
            for part in ("train", "pick")
        }

    def shards(self, name: str) -> ShardPlan:
        """Returns the shards of cached rows: images with the features of all experts."""
        assert self.job.warm_start is not None, "only jobs with a warm start cache rows"
        rows, lanes = self.cached_rows()[name], self.job.lanes
        count = len(load_rows(rows))
        experts = [source.model_dump(mode="json") for source in self.sources]
        return ShardPlan(
            stage=f"cached-{name}",
            fingerprint=fingerprint([rows.model_dump(mode="json"), experts]),
            purpose="cached features",
            seed=self.job.seed,
            num_samples=count,
            # Every lane needs a shard.
            samples_per_shard=max(1, min(self.job.warm_start.samples_per_shard, count // lanes)),
            lanes=lanes,
            window=max(1, min(4, count // lanes)),
            format="npy",
        )

    def manifests(self) -> list[StageManifest]:
        """Returns the manifests of all stages of cached rows."""
        return [
            StageManifest(
                plan=self.shards(name),
                kind="cached_features",
                condition="none",
                image_shape=self._row_shape,
                num_classes=self.target.num_classes,
                generator="hub",
                created_by=versions(),
            )
            for name in self.cached_rows()
        ]

    def warm_starts(self, repeat: int) -> list[StageSpec]:
        """Returns the trainings of all heads and hubs on cached features, if the job has any."""
        if (warm := self.job.warm_start) is None:
            return []
        stages = []
        for features in self._columns:
            head = CachedExpert(features=features, num_classes=self.target.num_classes)
            for use, rows in USES:
                name = f"{use}-{features.name}-seed{repeat}"
                stages.append(self._stage(name, repeat, head, rows=rows, warm=warm))
        for arm in self.job.pathways():
            hub = self.hub(arm, repeat).model_copy(update={"warm": None})
            model = CachedHub(hub=hub, features=self._columns, image_shape=self.target.image_shape)
            name = f"{arm.name}-seed{repeat}"
            stages.append(self._stage(name, repeat, model, HubSpec(loss=arm.loss), warm=warm))
        return stages

    @cached_property
    def _columns(self) -> tuple[CachedFeatures, ...]:
        offset, columns = math.prod(self.target.image_shape), []
        for name, network in self.experts.items():
            columns.append(CachedFeatures(name=name, offset=offset, width=network.num_features))
            offset += network.num_features
        return tuple(columns)

    @property
    def _row_shape(self) -> tuple[int, int, int]:
        return self._columns[-1].offset + self._columns[-1].width, 1, 1

    # Tasks.

    def features_tasks(self) -> list[Task[FeaturesInputs]]:
        """Returns a task for every expert: compute the features of all rows to cache."""
        job = self.job.identity()
        return [
            Task(f"features-{source.name}", FeaturesInputs(job=job, expert=source))
            for source in (self.sources if job.warm_start else ())
        ]

    def rows_tasks(self) -> list[Task[RowsInputs]]:
        """Returns a task for every set of rows to cache: store them as shards."""
        job = self.job.identity()
        return [Task(f"rows-{name}", RowsInputs(job=job, rows=name)) for name in self.cached_rows()]

    def evaluation_tasks(self) -> list[Task[EvaluateInputs]]:
        """Returns a task for every hub and ensemble: predictions and routes on the test split."""
        job = self.job.identity()
        return [
            Task(f"evaluate-{arm.name}-seed{n}", EvaluateInputs(job=job, arm=arm, repeat=n))
            for arm in job.arms
            if arm.route in ("pathway", "ensemble")
            for n in range(job.seeds)
        ]

    def timing_task(self, best: str) -> Task[TimeInputs]:
        """Returns the task that times the models of the first repeat."""
        return Task("timing", TimeInputs(job=self.job.identity(), best=best))

    def models(self, arm: HubArmConfig, repeat: int, *, best: str) -> tuple[str, ...]:
        """Returns the stages whose models make up an arm; more than one for ensembles only."""
        if arm.route == "ensemble":
            return tuple(f"single-{expert.name}-seed{repeat}" for expert in self.job.hub)
        name = f"single-{best}" if arm.route == "best_single" else arm.name
        return (f"{name}-seed{repeat}",)

    def table(self) -> PlanTable:
        """Returns trainings, tasks by phase, and the cost of every expert and hub."""
        stages = self.pretraining()
        for repeat in range(self.job.seeds):
            stages += self.warm_starts(repeat)
            stages += [*self.singles(repeat, pick=True), *self.singles(repeat)]
            stages += self.arms(repeat, best=self.job.hub[0].name)
        phases = (
            ("cached features", self.features_tasks(), "every expert over all labelled images"),
            ("cached rows", self.rows_tasks(), "shards of features"),
            ("evaluation", self.evaluation_tasks(), "routes on the test split"),
            ("timing", ["timing"], "every arm, one after another"),
        )
        rows = [TaskRow(phase=p, tasks=len(tasks), work=w) for p, tasks, w in phases if tasks]
        costs = cost_table(hub_rows(self.job, self.experts, self.target))
        return plan_table(self.job, train=stages, tasks=rows, tables=[costs])
