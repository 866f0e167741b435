"""Stages and tasks of one kind after those of another, with progress and a record of each.

For jobs without a group of trainers: what they train, one worker trains.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from dist_tl.cluster.config import Task, TrialsConfig
from dist_tl.cluster.session import RaySession
from dist_tl.cluster.tasks import run_tasks
from dist_tl.cluster.trials import Trials
from dist_tl.config import StrictModel
from dist_tl.jobs.spec import JobConfig
from dist_tl.report.results import StageRecord
from dist_tl.storage.attempts import Attempt
from dist_tl.storage.objects import ObjectStore
from dist_tl.telemetry import Progress
from dist_tl.train.spec import StageResult, StageSpec

Inputs = TypeVar("Inputs", bound=StrictModel)
Output = TypeVar("Output", bound=StrictModel)


class Phases:
    """The phases of a run so far.

    Attributes:
        records: what ran when, for the page.
    """

    def __init__(
        self, config: TrialsConfig, attempt: Attempt, progress: Progress, session: RaySession
    ) -> None:
        self._config, self._store, self._progress = config, attempt.store, progress
        self._attempt = attempt.number
        self._session = session
        self.records: list[StageRecord] = []

    @property
    def peak_memory_bytes(self) -> int:
        """Of this process and Ray's together."""
        return self._session.peak_memory_bytes

    def train(self, name: str, specs: Sequence[StageSpec]) -> list[StageResult]:
        """Train stages side by side, one worker each; done stages are only read.

        Raises:
            DistTLError: the named error that a stage met.
        """
        trials = Trials(
            self._config, self._store.url, roles=self._session.roles, attempt=self._attempt
        )
        tickets = [trials.start([spec]) for spec in specs]
        results = []
        for done, (spec, ticket) in enumerate(zip(specs, tickets, strict=True)):
            self._progress.update(name, done, len(specs), f"{spec.name}, {spec.steps} steps")
            [result] = trials.results(ticket, on_poll=self._session.check)
            self._progress.update(name, done + 1, len(specs), f"loss {result.final_loss:.3f}")
            figures = {"steps": float(result.steps), "samples": float(result.samples)}
            self._record(spec.name, "train", result.started, result.ended, figures)
            results.append(result)
        return results

    def run(
        self,
        name: str,
        work: Callable[[Inputs, ObjectStore], Output],
        tasks: Sequence[Task[Inputs]],
        answer: type[Output],
    ) -> list[Output]:
        """Run tasks side by side; the answers in their order.

        Raises:
            DistTLError: the named error that a task met; what is done stays done.
        """
        if not tasks:
            return []
        began = time.time()
        self._progress.update(name, 0, len(tasks))
        answers = run_tasks(
            work,
            tasks,
            answer,
            self._store,
            config=self._config,
            roles=self._session.roles,
            attempt=self._attempt,
            on_poll=self._session.check,
            on_done=lambda done, total, task: self._progress.update(name, done, total, task),
        )
        busy = sum(getattr(found, "seconds", 0.0) for found in answers)
        figures = {"tasks": float(len(tasks)), "task_seconds": busy}
        self._record(name, "trial", began, time.time(), figures)
        return answers

    def _record(
        self, name: str, kind: str, started: float, ended: float, figures: dict[str, float]
    ) -> None:
        self.records.append(
            StageRecord(name=name, kind=kind, started=started, ended=ended, figures=figures)
        )


@contextmanager
def open_phases(
    job: JobConfig, config: TrialsConfig, attempt: Attempt, progress: Progress
) -> Iterator[Phases]:
    """Start Ray for a job of phases."""
    progress.say("starting Ray")
    with RaySession(job.session, watch=attempt.poll) as session:
        yield Phases(config, attempt, progress, session)
