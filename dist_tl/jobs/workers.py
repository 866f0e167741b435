"""What a running job works with on Ray: trainers, generators, trials and tasks, with progress."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

from dist_tl.cluster.config import GeneratorsConfig, Task, TrialsConfig
from dist_tl.cluster.generators import GeneratorPool, StageProgress
from dist_tl.cluster.mailbox import Snapshot, open_mailbox, read_positions
from dist_tl.cluster.session import RaySession
from dist_tl.cluster.tasks import run_tasks
from dist_tl.cluster.trainers import TrainerGroup
from dist_tl.cluster.trials import Trials
from dist_tl.config import StrictModel
from dist_tl.jobs.spec import JobConfig, TrainingJobConfig
from dist_tl.jobs.stage_records import generation_record, training_record
from dist_tl.report.results import StageRecord
from dist_tl.shards.drawing import GenerateSpec
from dist_tl.storage.attempts import Attempt
from dist_tl.telemetry import Progress
from dist_tl.train.spec import StageResult, StageSpec
from dist_tl.train.stage import finished_result

Inputs = TypeVar("Inputs", bound=StrictModel)
Output = TypeVar("Output", bound=StrictModel)


class Workers:
    """The actors and tasks of one run, and a record of every stage they finish.

    Attributes:
        store: of the run.
        attempt: number of this attempt at the run.
        session: the Ray cluster.
        generation: progress of every stage of pseudo samples.
    """

    def __init__(
        self,
        job: JobConfig,
        attempt: Attempt,
        progress: Progress,
        session: RaySession,
        *,
        trainers: TrainerGroup | None = None,
        pool: GeneratorPool | None = None,
    ) -> None:
        self.store, self.attempt = attempt.store, attempt.number
        self.progress, self.session = progress, session
        self.generation: list[StageProgress] = []
        self._trainers, self._pool = trainers, pool
        self._trials_config: TrialsConfig = getattr(job, "trials", None) or TrialsConfig()
        self._trials = Trials(
            self._trials_config, self.store.url, roles=session.roles, attempt=attempt.number
        )
        self._started: dict[str, Any] = {}
        self._records: dict[str, StageRecord] = {}

    # The record.

    def record(self, stage: StageRecord) -> None:
        """Adds a stage to the timeline of the run; a later record of the same name replaces it."""
        self._records[stage.name] = stage

    def records(self) -> tuple[StageRecord, ...]:
        """Every stage so far, in order of its start."""
        stages = [*self._records.values(), *map(generation_record, self.generation)]
        return tuple(sorted(stages, key=lambda stage: stage.started))

    # Trainings.

    def train(self, specs: Sequence[StageSpec]) -> list[StageResult]:
        """Trains stages one after another on all trainers; finished stages are only read.

        Raises:
            DistTLError: the named error of a worker.
            WorkerError: workers died more often than they may be restarted.
        """
        assert self._trainers is not None, "only jobs with `trainers` train on the group"
        stored = [finished_result(self.store, spec) for spec in specs]
        tickets = [
            self._trainers.post(spec) if result is None else None
            for spec, result in zip(specs, stored, strict=True)
        ]
        results = []
        for spec, result, ticket in zip(specs, stored, tickets, strict=True):
            if result is None:
                assert ticket is not None, "stages without a result were posted above"
                on_poll = partial(self._show_training, spec)
                result = self._trainers.wait(ticket, on_poll=on_poll)
            results.append(result)
            self.record(training_record(result, "train"))
            self._show_stage("training stages", spec, result, len(results), len(specs))
        return results

    def train_apart(self, name: str, specs: Sequence[StageSpec]) -> list[StageResult]:
        """Trains independent stages side by side, one worker each; finished stages are only read.

        Raises:
            DistTLError: the named error of a stage.
        """
        for spec in specs:
            self.start_trials(spec.name, [spec])
        results = []
        for spec in specs:
            self.progress.update(name, len(results), len(specs), f"{spec.name}, {spec.steps} steps")
            [result] = self.trial_results(spec.name)
            results.append(result)
            self.record(training_record(result, "train"))
            self._show_stage(name, spec, result, len(results), len(specs))
        return results

    def start_trials(self, name: str, specs: Sequence[StageSpec]) -> None:
        """Starts stages in one worker, one after another, in the background."""
        self._started[name] = self._trials.start(specs)

    def trial_results(self, name: str) -> list[StageResult]:
        """Waits for the stages of :meth:`start_trials`.

        Raises:
            DistTLError: the named error of a stage.
        """
        results = self._trials.results(self._started[name], on_poll=self._check)
        for result in results:
            self.record(training_record(result, "trial"))
        return results

    # Tasks.

    def run_tasks(
        self,
        name: str,
        work: Callable[[Inputs, Any], Output],
        tasks: Sequence[Task[Inputs]],
        output: type[Output],
    ) -> list[Output]:
        """Runs independent tasks side by side; returns their outputs in order.

        Raises:
            DistTLError: the named error of a task; finished tasks are kept.
        """
        if not tasks:
            return []
        began = time.time()
        self.progress.update(name, 0, len(tasks))
        outputs = run_tasks(
            work,
            tasks,
            output,
            self.store,
            config=self._trials_config,
            roles=self.session.roles,
            attempt=self.attempt,
            on_poll=self._check,
            on_done=lambda done, total, task: self.progress.update(name, done, total, task),
        )
        busy = sum(getattr(result, "seconds", 0.0) for result in outputs)
        figures = {"tasks": float(len(tasks)), "task_seconds": busy}
        self.record(
            StageRecord(name=name, kind="trial", started=began, ended=time.time(), figures=figures)
        )
        return outputs

    # Pseudo samples.

    def generate(self, spec: GenerateSpec, *, batch_size: int) -> None:
        """Generates a stage of pseudo samples in the background; its manifest must be stored.

        Args:
            batch_size: the largest global batch that reads the stage.
        """
        assert self._pool is not None, "only jobs with `trainers` generate"
        self.generation.append(self._pool.add(spec, batch_size=batch_size))

    def finish_generation(self) -> None:
        """Waits until every queued shard is committed."""
        while not all(stage.done for stage in self.generation):
            self._check()
            self._show_generation()
            assert self._pool is not None, "it has made the stages that are waited for"
            self._pool.wait(0.2)
        self._show_generation()

    def _check(self) -> None:
        self.session.check()
        if self._pool is not None:
            self._pool.check()

    # Progress.

    def _show_training(self, spec: StageSpec, snapshot: Snapshot) -> None:
        self._check()
        step, loss = snapshot.step.get(spec.name, 0), snapshot.loss.get(spec.name)
        note = "waiting for the first step" if snapshot.ready else "starting the trainers"
        note = note if loss is None else f"loss {loss:.3f}"
        self.progress.update(spec.name, step, spec.steps, note)
        self._show_generation()

    def _show_stage(
        self, name: str, spec: StageSpec, result: StageResult, done: int, total: int
    ) -> None:
        for line in result.notes:
            self.progress.say(line)
        self.progress.update(name, done, total, spec.name)
        note = f"{result.seconds:.1f} s"
        if result.correct:
            note += f", accuracy {result.accuracy:.1%}"
        self.progress.update(spec.name, spec.steps, spec.steps, note)

    def _show_generation(self) -> None:
        if self.generation:
            assert self._pool is not None, "it makes the stages"
            committed = sum(stage.committed for stage in self.generation)
            total = sum(stage.num_shards for stage in self.generation)
            note = f"{self._pool.num_workers} generator workers"
            self.progress.update("pseudo-sample shards", committed, total, note)


@contextmanager
def open_workers(job: JobConfig, attempt: Attempt, progress: Progress) -> Iterator[Workers]:
    """Starts Ray and, for jobs that have them, the trainers; other actors start with their work."""
    with ExitStack() as stack:
        progress.say("starting Ray")
        session = stack.enter_context(RaySession(job.session, watch=attempt.poll))
        if not isinstance(job, TrainingJobConfig):
            yield Workers(job, attempt, progress, session)
            return
        mailbox, roles = open_mailbox(), job.session.roles
        pool = GeneratorPool(
            getattr(job, "generators", None) or GeneratorsConfig(),
            attempt.store.url,
            positions=partial(read_positions, mailbox),
            roles=roles,
        )
        trainers = TrainerGroup(job.trainers, attempt, mailbox, roles=roles)
        stack.enter_context(trainers)
        stack.enter_context(pool)
        yield Workers(job, attempt, progress, session, trainers=trainers, pool=pool)
