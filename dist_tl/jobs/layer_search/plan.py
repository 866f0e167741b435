"""Plans a layer search: teachers, features, the one-shot set, episodes, the exported model."""

from collections.abc import Sequence
from dataclasses import dataclass

from dist_tl.cluster.config import Task
from dist_tl.datasets.spec import DataConfig
from dist_tl.jobs.layer_search.features import FeatureFiles, FeaturesInputs
from dist_tl.jobs.layer_search.spec import LayerSearchJob
from dist_tl.jobs.layer_search.tasks import EpisodesInputs, ExportInputs, OneShotInputs
from dist_tl.jobs.plan import PlanTable, TaskRow, plan_table
from dist_tl.jobs.teacher import teacher_location, teacher_stages
from dist_tl.methods.layer_search.episodes import EpisodesConfig, check_classes
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.rows import RowsSpec, load_rows
from dist_tl.train.spec import StageSpec

STAND_IN = "stand-in-teacher"
NUM_VIEWS = 4


def plan(job: LayerSearchJob, store: ObjectStore) -> "LayerSearchPlan":
    """The stages and tasks of a job.

    Raises:
        ConfigError: the episodes need more than the data has.
        DataError: the data is damaged.
    """
    labels_N = load_rows(RowsSpec(data=job.data)).labels
    check_classes(labels_N, job.episodes)
    if job.export_shots is not None:
        check_classes(labels_N, _export_config(job))
    if job.held_out is not None:
        one_shot = EpisodesConfig(ways=2, shots=(1,), queries=job.episodes.queries)
        check_classes(load_rows(RowsSpec(data=job.held_out.data)).labels, one_shot)
    return LayerSearchPlan(job)


@dataclass(frozen=True)
class LayerSearchPlan:
    """Stages and tasks of a job, from its file and its data."""

    job: LayerSearchJob

    def table(self) -> PlanTable:
        """The teachers' trainings and the tasks by phase."""
        job = self.job
        rows = (
            ("features", self.all_features(), f"{job.rows_per_task} images each"),
            ("one-shot set", self.one_shot(), "search on held-out classes"),
            ("episodes", self.episodes(None), f"{job.episodes_per_task} episodes each"),
        )
        tasks = [TaskRow(phase=name, tasks=len(tasks), work=work) for name, tasks, work in rows]
        return plan_table(job, tasks=tasks, train=self.teachers())

    def teachers(self) -> list[StageSpec]:
        """The trainings of the teacher and of its stand-in, if the job has any."""
        job = self.job
        stand_in = None if job.held_out is None else job.held_out.teacher
        return [
            *teacher_stages(job.teacher, seed=job.seed),
            *teacher_stages(stand_in, seed=job.seed, name=STAND_IN),
        ]

    def target_features(self) -> list[Task[FeaturesInputs]]:
        """Features of the target data."""
        return self._features("target", self.job.data, teacher_location(self.job.teacher))

    def view_features(self) -> list[list[Task[FeaturesInputs]]]:
        """Features of augmented views of the target data, where the one-shot rule asks for them."""
        if self.job.search.one_shot != "augmented_views" or 1 not in self.job.episodes.shots:
            return []
        place = teacher_location(self.job.teacher)
        return [
            self._features(f"view{view}", self.job.data, place, view=view)
            for view in range(NUM_VIEWS)
        ]

    def held_out_features(self) -> list[Task[FeaturesInputs]]:
        """Features of the held-out classes."""
        held_out = self.job.held_out
        if held_out is None:
            return []
        own = teacher_location(self.job.teacher)
        place = own if held_out.teacher is None else layout.stage_model_prefix(STAND_IN)
        return self._features("held-out", held_out.data, place)

    def _features(
        self, name: str, data: DataConfig, model: str, *, view: int | None = None
    ) -> list[Task[FeaturesInputs]]:
        count, width = len(load_rows(RowsSpec(data=data))), self.job.rows_per_task
        return [
            Task(
                f"features-{name}-{part}",
                FeaturesInputs(
                    model=model,
                    data=data,
                    pooling=self.job.pooling,
                    first=first,
                    last=min(first + width, count),
                    key=f"{layout.stage_prefix(f'features-{name}-{part}')}/layers.safetensors",
                    view=view,
                    seed=self.job.seed,
                ),
            )
            for part, first in enumerate(range(0, count, width))
        ]

    def all_features(self) -> list[Task[FeaturesInputs]]:
        """Every feature task, those of the target data first."""
        views = [task for tasks in self.view_features() for task in tasks]
        return [*self.target_features(), *self.held_out_features(), *views]

    def one_shot(self) -> list[Task[OneShotInputs]]:
        """The search on held-out classes, where there are any."""
        job = self.job
        if job.held_out is None or job.search.one_shot != "held_out_classes":
            return []
        inputs = OneShotInputs(
            seed=job.seed,
            features=_files(job.held_out.data, self.held_out_features()),
            ways=job.episodes.ways,
            queries=job.episodes.queries,
            episodes=job.held_out.episodes,
            search=job.search,
        )
        return [Task("one-shot-set", inputs)]

    def export(self) -> list[Task[ExportInputs]]:
        """The chosen layers as a model, where the job wants one."""
        job = self.job
        if job.export_shots is None:
            return []
        inputs = ExportInputs(
            seed=job.seed,
            teacher=teacher_location(job.teacher),
            features=_files(job.data, self.target_features()),
            pooling=job.pooling,
            shots=job.export_shots,
            queries=job.episodes.queries,
            search=job.search,
            trained=job.trained,
        )
        return [Task("export", inputs)]

    def episodes(self, fixed: tuple[int, ...] | None) -> list[Task[EpisodesInputs]]:
        """All episodes, in batches; the order of the answers is that of the episodes."""
        job, files = self.job, _files(self.job.data, self.target_features())
        views = tuple(_files(job.data, tasks) for tasks in self.view_features())
        return [
            Task(
                f"episodes-k{shots}-from{first}",
                EpisodesInputs(
                    seed=job.seed,
                    features=files,
                    episodes=job.episodes,
                    shots=shots,
                    first=first,
                    count=min(job.episodes_per_task, job.episodes.count - first),
                    search=job.search,
                    fixed=fixed if shots == 1 else None,
                    views=views if shots == 1 else (),
                    trained=job.trained,
                    teacher=teacher_location(job.teacher),
                ),
            )
            for shots in job.episodes.shots
            for first in range(0, job.episodes.count, job.episodes_per_task)
        ]


def _export_config(job: LayerSearchJob) -> EpisodesConfig:
    assert job.export_shots is not None, "asked for by the job"
    ways = load_rows(RowsSpec(data=job.data)).num_classes
    return EpisodesConfig(ways=ways, shots=(job.export_shots,), queries=job.episodes.queries)


def _files(data: DataConfig, tasks: Sequence[Task[FeaturesInputs]]) -> FeatureFiles:
    return FeatureFiles(data=data, keys=tuple(task.inputs.key for task in tasks))
