"""The workers of a running job, and how their progress is shown while it waits for them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
from dist_tl.jobs.spec import TrainingJobConfig
from dist_tl.shards.drawing import GenerateSpec
from dist_tl.storage.attempts import Attempt
from dist_tl.storage.objects import ObjectStore
from dist_tl.telemetry import Progress
from dist_tl.train.spec import StageResult, StageSpec, read_result

Inputs = TypeVar("Inputs", bound=StrictModel)
Output = TypeVar("Output", bound=StrictModel)


@dataclass
class Workers:
    """Trainers, generators and trials of one run."""

    store: ObjectStore
    trainers: TrainerGroup
    pool: GeneratorPool
    trials: Trials
    trials_config: TrialsConfig
    attempt: int
    progress: Progress
    session: RaySession
    generation: list[StageProgress] = field(default_factory=list)
    trial_tickets: dict[str, Any] = field(default_factory=dict)

    def train(self, specs: Sequence[StageSpec]) -> list[StageResult]:
        """Train stages one after another on the whole group; done stages are only read.

        Raises:
            DistTLError: the named error that a worker met.
            WorkerError: workers died more often than they may be restarted.
        """
        found = [read_result(self.store, spec) for spec in specs]
        tickets = [
            self.trainers.post(spec) if done is None else None
            for spec, done in zip(specs, found, strict=True)
        ]
        results = []
        for spec, done, ticket in zip(specs, found, tickets, strict=True):
            if done is None:
                assert ticket is not None, "a stage without a result was posted above"
                done = self.trainers.wait(ticket, on_poll=lambda s, spec=spec: self._show(spec, s))
            results.append(done)
            self.progress.update("training stages", len(results), len(specs), spec.name)
            self._stage_done(spec, done)
        return results

    def generate(self, spec: GenerateSpec, *, batch_size: int) -> None:
        """Have a stage of pseudo samples made in the background; its manifest must be stored.

        Args:
            batch_size: the largest global batch that reads it.
        """
        self.generation.append(self.pool.add(spec, batch_size=batch_size))

    def start_trials(self, name: str, specs: Sequence[StageSpec]) -> None:
        """Start independent stages in a worker of their own, in the background."""
        self.trial_tickets[name] = self.trials.start(specs)

    def trial_results(self, name: str) -> list[StageResult]:
        """The results of :meth:`start_trials`, waited for."""
        return self.trials.results(self.trial_tickets[name], on_poll=self._check)

    def run(
        self,
        name: str,
        work: Callable[[Inputs, ObjectStore], Output],
        tasks: Sequence[Task[Inputs]],
        answer: type[Output],
    ) -> list[Output]:
        """Run independent tasks beside the trainers; the answers in their order.

        Raises:
            DistTLError: the named error that a task met; what is done stays done.
        """
        return run_tasks(
            work,
            tasks,
            answer,
            self.store,
            config=self.trials_config,
            roles=self.session.roles,
            attempt=self.attempt,
            on_poll=self._check,
            on_done=lambda done, total, task: self.progress.update(name, done, total, task),
        )

    def finish_generation(self) -> None:
        """Wait until every queued shard is committed."""
        while not all(stage.done for stage in self.generation):
            self._check()
            self._show_generation()
            self.pool.wait(0.2)
        self._show_generation()

    def _check(self) -> None:
        self.session.check()
        self.pool.check()

    def _show(self, spec: StageSpec, snapshot: Snapshot) -> None:
        self._check()
        step = snapshot.step.get(spec.name, 0)
        loss = snapshot.loss.get(spec.name)
        note = "starting the trainers" if not snapshot.ready else "waiting for the first step"
        self.progress.update(
            spec.name, step, spec.steps, note if loss is None else f"loss {loss:.3f}"
        )
        self._show_generation()

    def _stage_done(self, spec: StageSpec, result: StageResult) -> None:
        note = f"{result.seconds:.1f} s"
        if result.correct:
            note += f", accuracy {result.accuracy:.1%}"
        self.progress.update(spec.name, spec.steps, spec.steps, note)

    def _show_generation(self) -> None:
        if self.generation:
            committed = sum(stage.committed for stage in self.generation)
            total = sum(stage.num_shards for stage in self.generation)
            note = f"{self.pool.num_workers} generator workers"
            self.progress.update("pseudo-sample shards", committed, total, note)


@contextmanager
def open_workers(
    job: TrainingJobConfig,
    attempt: Attempt,
    progress: Progress,
    *,
    generators: GeneratorsConfig | None = None,
    trials: TrialsConfig | None = None,
) -> Iterator[Workers]:
    """Start Ray and the trainers; generators and trials start when there is work for them."""
    with ExitStack() as stack:
        progress.say("starting Ray and the trainers")
        store, roles = attempt.store, job.session.roles
        session = stack.enter_context(RaySession(job.session, watch=attempt.poll))
        mailbox = open_mailbox()
        pool = GeneratorPool(
            generators or GeneratorsConfig(),
            store.url,
            positions=partial(read_positions, mailbox),
            roles=roles,
        )
        trainers = TrainerGroup(job.trainers, attempt, mailbox, roles=roles)
        stack.enter_context(trainers)
        stack.enter_context(pool)
        yield Workers(
            store=store,
            trainers=trainers,
            pool=pool,
            trials=Trials(trials or TrialsConfig(), store.url, roles=roles, attempt=attempt.number),
            trials_config=trials or TrialsConfig(),
            attempt=attempt.number,
            progress=progress,
            session=session,
        )
