"""Warm starts of a hub job: cached features, and trainings on them before those of the arms."""

import math
from dataclasses import dataclass
from functools import cached_property

from dist_tl.cluster.config import Task
from dist_tl.config import fingerprint
from dist_tl.datasets.views import ViewsConfig
from dist_tl.jobs.hub.features import FeaturesInputs, RowsInputs
from dist_tl.jobs.hub.spec import ExpertConfig, WarmStartConfig
from dist_tl.jobs.hub.stages import HubStages
from dist_tl.jobs.plan import TaskRow
from dist_tl.jobs.stages import repeat_seed, training_stage
from dist_tl.jobs.versions import versions
from dist_tl.shards.manifest import StageManifest
from dist_tl.shards.order import ShardPlan
from dist_tl.storage import layout
from dist_tl.train.cached import CachedExpert, CachedFeatures, CachedHub
from dist_tl.train.models import ModelSpec
from dist_tl.train.objectives import HubSpec, ObjectiveSpec, SupervisedSpec
from dist_tl.train.rows import RowsSpec, load_rows
from dist_tl.train.spec import StageSpec


@dataclass(frozen=True)
class WarmStart:
    """The tasks and stages of a job's warm starts."""

    plan: HubStages
    config: WarmStartConfig

    def features(self) -> list[Task[FeaturesInputs]]:
        """Every expert over all labelled images, once."""
        return [
            Task(
                f"features-{expert.name}",
                FeaturesInputs(
                    expert=self.plan.source(expert),
                    rows=self._cached_rows(),
                    num_classes=self.plan.target.num_classes,
                    key=self._features_key(expert),
                ),
            )
            for expert in self.plan.job.hub
        ]

    def _cached_rows(self) -> dict[str, RowsSpec]:
        rows = {}
        for repeat in range(self.plan.job.seeds):
            rows[f"train-seed{repeat}"] = self.plan.rows(repeat, "train")
            rows[f"pick-seed{repeat}"] = self.plan.rows(repeat, "train", held_out=False)
        return rows

    def _features_key(self, expert: ExpertConfig) -> str:
        return f"{layout.stage_prefix(f'features-{expert.name}')}/features.safetensors"

    def cached_rows(self) -> list[Task[RowsInputs]]:
        """Images with their features, as shards: the labelled ones, and all but one fold."""
        keys = tuple(map(self._features_key, self.plan.job.hub))
        return [
            Task(
                f"rows-{name}",
                RowsInputs(plan=self._shard_plan(name), rows=rows, name=name, features=keys),
            )
            for name, rows in self._cached_rows().items()
        ]

    def _shard_plan(self, name: str) -> ShardPlan:
        lanes = self.plan.job.lanes
        rows = self._cached_rows()[name]
        count = len(load_rows(rows))
        experts = [self.plan.source(expert).model_dump(mode="json") for expert in self.plan.job.hub]
        return ShardPlan(
            stage=f"cached-{name}",
            fingerprint=fingerprint([rows.model_dump(mode="json"), experts]),
            purpose="cached features",
            seed=self.plan.job.seed,
            num_samples=count,
            # Every lane needs a shard.
            samples_per_shard=max(1, min(self.config.samples_per_shard, count // lanes)),
            lanes=lanes,
            window=max(1, min(4, count // lanes)),
            format="npy",
        )

    def manifests(self) -> list[StageManifest]:
        """What all shards of each set of cached rows have in common."""
        return [
            StageManifest(
                plan=task.inputs.plan,
                kind="cached_features",
                condition="none",
                image_shape=(self._row_width, 1, 1),
                num_classes=self.plan.target.num_classes,
                generator="hub",
                created_by=versions(),
            )
            for task in self.cached_rows()
        ]

    def task_rows(self) -> tuple[TaskRow, TaskRow]:
        """The tasks by phase."""
        work = "every expert over all labelled images"
        return (
            TaskRow(phase="cached features", tasks=len(self.features()), work=work),
            TaskRow(phase="cached rows", tasks=len(self.cached_rows()), work="shards of features"),
        )

    def starts(self, repeat: int) -> list[StageSpec]:
        """Heads of single experts, for their own sakes and for picking, and whole hubs."""
        stages = []
        for part in self._columns:
            head = CachedExpert(features=part, num_classes=self.plan.target.num_classes)
            for use, rows in (("single", "train"), ("pick", "pick")):
                name = f"{use}-{part.name}-seed{repeat}"
                stages.append(self._stage(name, repeat, rows, head, SupervisedSpec()))
        for arm in self.plan.job.arms:
            if arm.route == "pathway":
                hub = self.plan.hub(arm, repeat).model_copy(update={"warm": None})
                cached = CachedHub(
                    hub=hub, features=self._columns, image_shape=self.plan.target.image_shape
                )
                objective = HubSpec(loss=arm.loss)
                name = f"{arm.name}-seed{repeat}"
                stages.append(self._stage(name, repeat, "train", cached, objective))
        return stages

    @cached_property
    def _columns(self) -> tuple[CachedFeatures, ...]:
        offset, columns = math.prod(self.plan.target.image_shape), []
        for name, network in self.plan.experts.items():
            width = network.num_features
            columns.append(CachedFeatures(name=name, offset=offset, width=width))
            offset += width
        return tuple(columns)

    @property
    def _row_width(self) -> int:
        return self._columns[-1].offset + self._columns[-1].width

    def _stage(
        self, name: str, repeat: int, rows: str, model: ModelSpec, objective: ObjectiveSpec
    ) -> StageSpec:
        return training_stage(
            self.plan.job,
            self.config.training,
            name=f"warm-{name}",
            seed=repeat_seed(self.plan.job, repeat),
            model=model,
            objective=objective,
            image_shape=(self._row_width, 1, 1),
            labelled=self._shard_plan(f"{rows}-seed{repeat}"),
            views=ViewsConfig(kind="none"),
        )
