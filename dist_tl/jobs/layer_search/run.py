"""The layer search job: teacher, features, the one-shot set, episodes. Wiring only."""

from collections.abc import Sequence
from dataclasses import dataclass

from dist_tl.cluster.config import Task
from dist_tl.datasets.spec import DataConfig
from dist_tl.jobs.layer_search.features import (
    FeatureFiles,
    FeaturesInputs,
    FeaturesOutput,
    compute_features,
)
from dist_tl.jobs.layer_search.spec import LayerSearchJob
from dist_tl.jobs.layer_search.tasks import (
    EpisodeOutput,
    EpisodesInputs,
    EpisodesOutput,
    ExportInputs,
    ExportOutput,
    OneShotInputs,
    OneShotOutput,
    export_selected,
    find_one_shot_set,
    run_episodes,
)
from dist_tl.jobs.phases import open_phases
from dist_tl.jobs.teacher import TeacherConfig, teacher_place, teacher_stage
from dist_tl.methods.layer_search.episodes import EpisodesConfig, check_classes
from dist_tl.report.results import StageRecord
from dist_tl.storage import layout
from dist_tl.storage.attempts import Attempt
from dist_tl.telemetry import Progress
from dist_tl.train.rows import RowsSpec, load_rows
from dist_tl.train.spec import StageSpec

STAND_IN = "stand-in-teacher"
NUM_VIEWS = 4


@dataclass(frozen=True)
class LayerSearchOutcome:
    """What all episodes came to.

    Attributes:
        episodes: by number of shots, in order of their index.
        widths: of every layer, the penultimate last.
        one_shot: the set for one label a class; None where there are no held-out classes.
    """

    job: LayerSearchJob
    episodes: dict[int, list[EpisodeOutput]]
    widths: tuple[int, ...]
    zeros: int
    one_shot: tuple[int, ...] | None
    exported: ExportOutput | None
    stages: tuple[StageRecord, ...]
    peak_memory_bytes: int


class LayerSearchPlan:
    """Stages and tasks of a job, from its file and its data.

    Raises:
        ConfigError: the episodes ask for more than the data has.
        DataError: the data is damaged.
    """

    def __init__(self, job: LayerSearchJob) -> None:
        self.job = job
        check_classes(load_rows(RowsSpec(data=job.data)).labels, job.episodes)
        if job.export_shots is not None:
            check_classes(load_rows(RowsSpec(data=job.data)).labels, _export_config(job))
        if job.held_out is not None:
            one_shot = EpisodesConfig(ways=2, shots=(1,), queries=job.episodes.queries)
            check_classes(load_rows(RowsSpec(data=job.held_out.data)).labels, one_shot)

    def teachers(self) -> list[StageSpec]:
        """The trainings of the teacher and of its stand-in, where there are any."""
        job, stages = self.job, []
        if isinstance(job.teacher, TeacherConfig):
            stages.append(teacher_stage(job.teacher, seed=job.seed))
        if job.held_out is not None and job.held_out.teacher is not None:
            stand_in = teacher_stage(job.held_out.teacher, seed=job.seed)
            stages.append(stand_in.model_copy(update={"name": STAND_IN}))
        return stages

    def target_features(self) -> list[Task[FeaturesInputs]]:
        """Features of the target data."""
        return self._features("target", self.job.data, teacher_place(self.job.teacher))

    def view_features(self) -> list[list[Task[FeaturesInputs]]]:
        """Features of augmented views of the target data, where the one-shot rule asks for them."""
        if self.job.search.one_shot != "augmented_views" or 1 not in self.job.episodes.shots:
            return []
        place = teacher_place(self.job.teacher)
        return [
            self._features(f"view{view}", self.job.data, place, view=view)
            for view in range(NUM_VIEWS)
        ]

    def held_out_features(self) -> list[Task[FeaturesInputs]]:
        """Features of the held-out classes."""
        held_out = self.job.held_out
        if held_out is None:
            return []
        own = teacher_place(self.job.teacher)
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
            teacher=teacher_place(job.teacher),
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
                    teacher=teacher_place(job.teacher),
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


def run_layer_search(
    job: LayerSearchJob, attempt: Attempt, progress: Progress
) -> LayerSearchOutcome:
    """Run every stage and task that is not done yet.

    Raises:
        DistTLError: the named error that a task met; what is done stays done.
    """
    plan = LayerSearchPlan(job)
    with open_phases(job, job.trials, attempt, progress) as phases:
        phases.train("teachers", plan.teachers())
        features = phases.run(
            "features",
            compute_features,
            plan.all_features(),
            FeaturesOutput,
        )
        found = phases.run("one-shot set", find_one_shot_set, plan.one_shot(), OneShotOutput)
        one_shot = found[0].layers if found else None
        tasks = plan.episodes(one_shot)
        answers = phases.run("episodes", run_episodes, tasks, EpisodesOutput)
        exported = phases.run("export", export_selected, plan.export(), ExportOutput)
        memory = phases.peak_memory_bytes
    by_shots: dict[int, list[EpisodeOutput]] = {shots: [] for shots in job.episodes.shots}
    for task, answer in zip(tasks, answers, strict=True):
        by_shots[task.inputs.shots] += answer.episodes
    return LayerSearchOutcome(
        job=job,
        episodes=by_shots,
        widths=features[0].widths,
        zeros=sum(answer.zeros for answer in features),
        one_shot=one_shot,
        exported=exported[0] if exported else None,
        stages=tuple(phases.records),
        peak_memory_bytes=memory,
    )
