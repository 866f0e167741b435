"""Stages and tasks of a layer search: teachers, features, one-shot set, episodes, export."""

from dataclasses import dataclass, replace

from pydantic import Field

from dist_tl.cluster.config import Task
from dist_tl.config import StrictModel
from dist_tl.datasets.images import LabelledImages
from dist_tl.datasets.spec import DataConfig
from dist_tl.jobs.layer_search.spec import LayerSearchJob
from dist_tl.jobs.plan import PlanTable, TaskRow, plan_table
from dist_tl.jobs.stages import drawn_items
from dist_tl.jobs.teacher import teacher_location, teacher_stages
from dist_tl.methods.layer_search.episodes import (
    Episode,
    EpisodesConfig,
    check_classes,
    draw_episode,
)
from dist_tl.methods.layer_search.gram import LayerSet
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.rows import RowsSpec, load_rows
from dist_tl.train.spec import StageSpec

STAND_IN = "stand-in-teacher"
NUM_VIEWS = 4


class FeatureSet(StrictModel):
    """A data set and the network that computes its layer vectors."""

    data: DataConfig
    model: str = Field(description="Location of the network's files.")
    view: int | None = Field(default=None, description="Index of an augmented view, if it is one.")


class FeaturesInputs(StrictModel):
    """Inputs of a feature task: a range of rows of a data set."""

    job: LayerSearchJob
    features: FeatureSet
    first: int
    last: int
    key: str = Field(description="Key of the stored vectors.")


class EpisodesInputs(StrictModel):
    """Inputs of an episode task: a batch of episodes with the same number of shots."""

    job: LayerSearchJob
    shots: int
    first: int = Field(description="Index of the first episode.")
    one_shot: LayerSet | None = Field(description="Layers for one shot, from held-out classes.")


def plan(job: LayerSearchJob, store: ObjectStore) -> "LayerSearchPlan":
    """Returns the stages and tasks of a job.

    Raises:
        ConfigError: the episodes need more than the data has.
        DataError: the data is damaged.
    """
    rows = load_rows(RowsSpec(data=job.data))
    check_classes(rows.labels[drawn_items(job, rows)], job.episodes)
    if job.export_shots is not None:
        check_classes(rows.labels[drawn_items(job, rows)], export_episodes(job))
    if job.held_out is not None:
        one_shot = EpisodesConfig(ways=2, shots=(1,), queries=job.episodes.queries)
        rows = load_rows(RowsSpec(data=job.held_out.data))
        check_classes(rows.labels[drawn_items(job, rows)], one_shot)
    return LayerSearchPlan(job)


def draw_items(
    job: LayerSearchJob, rows: LabelledImages, config: EpisodesConfig, shots: int, index: int
) -> Episode:
    """Draws an episode from the rows that draws may use."""
    items = drawn_items(job, rows)
    episode = draw_episode(rows.labels[items], config, shots, seed=job.seed, index=index)
    support_S, query_Q = items[episode.support_S], items[episode.query_Q]
    return replace(episode, support_S=support_S, query_Q=query_Q)


def export_episodes(job: LayerSearchJob) -> EpisodesConfig:
    """Returns the settings of the single episode of all classes behind the exported model."""
    assert job.export_shots is not None, "only jobs with export_shots export a model"
    ways = load_rows(RowsSpec(data=job.data)).num_classes
    return EpisodesConfig(ways=ways, shots=(job.export_shots,), queries=job.episodes.queries)


@dataclass(frozen=True)
class LayerSearchPlan:
    """Stages and tasks of a job."""

    job: LayerSearchJob

    def table(self) -> PlanTable:
        """Returns the training stages and the tasks by phase."""
        job = self.job
        rows = (
            ("features", self.features(), f"{job.rows_per_task} images each"),
            ("one-shot set", self.one_shot(), "search on held-out classes"),
            ("episodes", self.episodes(None), f"{job.episodes_per_task} episodes each"),
        )
        tasks = [TaskRow(phase=name, tasks=len(tasks), work=work) for name, tasks, work in rows]
        return plan_table(job, tasks=tasks, train=self.teachers())

    def teachers(self) -> list[StageSpec]:
        """Returns the training stages of the teacher and its stand-in; stored ones have none."""
        job = self.job
        stand_in = None if job.held_out is None else job.held_out.teacher
        return [
            *teacher_stages(job.teacher, seed=job.seed),
            *teacher_stages(stand_in, seed=job.seed, name=STAND_IN),
        ]

    @property
    def feature_sets(self) -> dict[str, FeatureSet]:
        """The data sets whose layer vectors are computed: target, held-out classes, views."""
        job, teacher = self.job, teacher_location(self.job.teacher)
        sets = {"target": FeatureSet(data=job.data, model=teacher)}
        if job.held_out is not None:
            own = job.held_out.teacher is not None
            model = layout.stage_model_prefix(STAND_IN) if own else teacher
            sets["held-out"] = FeatureSet(data=job.held_out.data, model=model)
        if job.search.one_shot == "augmented_views" and 1 in job.episodes.shots:
            for view in range(NUM_VIEWS):
                sets[f"view{view}"] = FeatureSet(data=job.data, model=teacher, view=view)
        return sets

    def features(self) -> list[Task[FeaturesInputs]]:
        """Returns all feature tasks, those of the target data first."""
        return [task for name in self.feature_sets for task in self._feature_tasks(name)]

    def vector_keys(self, name: str) -> tuple[str, ...]:
        """Returns the keys of the stored vectors of a feature set, in the order of its rows."""
        return tuple(task.inputs.key for task in self._feature_tasks(name))

    def _feature_tasks(self, name: str) -> list[Task[FeaturesInputs]]:
        job, features, tasks = self.job.identity(), self.feature_sets[name], []
        count, width = len(load_rows(RowsSpec(data=features.data))), job.rows_per_task
        for part, first in enumerate(range(0, count, width)):
            task = f"features-{name}-{part}"
            key = f"{layout.stage_prefix(task)}/layers.safetensors"
            last = min(first + width, count)
            inputs = FeaturesInputs(job=job, features=features, first=first, last=last, key=key)
            tasks.append(Task(task, inputs))
        return tasks

    def one_shot(self) -> list[Task[LayerSearchJob]]:
        """Returns the search on held-out classes; empty unless the one-shot rule uses them."""
        job = self.job
        if job.held_out is None or job.search.one_shot != "held_out_classes":
            return []
        return [Task("one-shot-set", job.identity())]

    def episodes(self, one_shot: LayerSet | None) -> list[Task[EpisodesInputs]]:
        """Returns the episodes in batches, in the order of their index.

        Args:
            one_shot: layers for tasks with one label a class.
        """
        job, tasks = self.job.identity(), []
        for shots in job.episodes.shots:
            fixed = one_shot if shots == 1 else None
            for first in range(0, job.episodes.count, job.episodes_per_task):
                inputs = EpisodesInputs(job=job, shots=shots, first=first, one_shot=fixed)
                tasks.append(Task(f"episodes-k{shots}-from{first}", inputs))
        return tasks

    def export(self) -> list[Task[LayerSearchJob]]:
        """Returns the export of the selected layers as a model; empty unless the job exports."""
        return [] if self.job.export_shots is None else [Task("export", self.job.identity())]
