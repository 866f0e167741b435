"""The manifold job: sources, moments, cells and baselines as Ray tasks. Wiring only."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dist_tl.cluster.config import Task
from dist_tl.cluster.session import RaySession
from dist_tl.cluster.tasks import run_tasks
from dist_tl.config import StrictModel
from dist_tl.jobs.manifold_plan import ManifoldPlan
from dist_tl.jobs.manifold_points import (
    PointsAnswer,
    measure_baseline,
    measure_cell,
)
from dist_tl.jobs.manifold_sources import (
    SourceAnswer,
    Stored,
    sum_moments,
    train_source,
)
from dist_tl.jobs.manifold_spec import ManifoldJob
from dist_tl.results import StageRecord
from dist_tl.storage.objects import ObjectStore
from dist_tl.telemetry import Progress

Asked = TypeVar("Asked", bound=StrictModel)
Answer = TypeVar("Answer", bound=StrictModel)


@dataclass(frozen=True)
class ManifoldOutcome:
    """What all tasks found, by instance and cell."""

    job: ManifoldJob
    sources: dict[tuple[int, int], SourceAnswer]  # by instance and source_latent
    cells: dict[tuple[int, str], PointsAnswer]  # by instance and cell
    baselines: dict[tuple[int, int], PointsAnswer]  # by instance and target_latent
    stages: tuple[StageRecord, ...]
    peak_memory_bytes: int


def run_manifold(job: ManifoldJob, store: ObjectStore, progress: Progress) -> ManifoldOutcome:
    """Run every task that is not done yet.

    Raises:
        DistTLError: the named error that a task met; what is done stays done.
    """
    plan = ManifoldPlan(job)
    progress.say("starting Ray")
    with RaySession(job.session) as session:
        phases = _Phases(job, store, progress, session)
        sources = phases.run("sources", train_source, plan.sources(), SourceAnswer)
        phases.run("moments", sum_moments, plan.moments(), Stored)
        baselines = phases.run("baselines", measure_baseline, plan.baselines(), PointsAnswer)
        cells = phases.run("cells", measure_cell, plan.cells(), PointsAnswer)
        stages, memory = tuple(phases.records), session.peak_memory_bytes
    return ManifoldOutcome(
        job=job,
        sources=dict(zip(plan.source_keys(), sources, strict=True)),
        cells=dict(zip(plan.cell_keys(), cells, strict=True)),
        baselines=dict(zip(plan.baseline_keys(), baselines, strict=True)),
        stages=stages,
        peak_memory_bytes=memory,
    )


class _Phases:
    """Tasks of one kind after those of another, with progress and a record of each."""

    def __init__(
        self, job: ManifoldJob, store: ObjectStore, progress: Progress, session: RaySession
    ) -> None:
        self._job, self._store, self._progress, self._session = job, store, progress, session
        self.records: list[StageRecord] = []

    def run(
        self,
        name: str,
        work: Callable[[Asked, ObjectStore], Answer],
        tasks: Sequence[Task[Asked]],
        answer: type[Answer],
    ) -> list[Answer]:
        began = time.time()
        self._progress.update(name, 0, len(tasks))
        answers = run_tasks(
            work,
            tasks,
            answer,
            self._store,
            config=self._job.trials,
            on_poll=self._session.check,
            on_done=lambda done, total, task: self._progress.update(name, done, total, task),
        )
        busy = sum(getattr(found, "seconds", 0.0) for found in answers)
        figures = {"tasks": float(len(tasks)), "task_seconds": busy}
        self.records.append(
            StageRecord(name=name, kind="trial", started=began, ended=time.time(), figures=figures)
        )
        return answers
