"""The transfer job: from a source, a little target data and arms to scores. Wiring only."""

from dataclasses import dataclass, replace

from torch import Tensor

from dist_tl.cluster.generators import StageProgress
from dist_tl.jobs.source.plan import SOURCE_STAGES, SourceFacts, open_assets, planned_facts
from dist_tl.jobs.source.run import find_source, judge_generator, train_source
from dist_tl.jobs.transfer.plan import PP_SHARDS, TransferPlan, check_target
from dist_tl.jobs.transfer.spec import ArmConfig, SourceConfig, TransferJob
from dist_tl.jobs.versions import versions
from dist_tl.jobs.workers import Workers, open_workers
from dist_tl.methods.pseudo.conditions import source_probabilities
from dist_tl.methods.pseudo.guard import (
    GuardConfig,
    GuardDecision,
    choose_lambda,
    num_guard_folds,
    unguarded,
)
from dist_tl.report.results import GeneratorQuality
from dist_tl.shards.drawing import ByTarget, GenerateSpec, open_generate_stage
from dist_tl.shards.order import ShardPlan
from dist_tl.storage.attempts import Attempt
from dist_tl.storage.objects import ObjectStore
from dist_tl.telemetry import Progress
from dist_tl.train.models import load_classifier
from dist_tl.train.rows import load_rows
from dist_tl.train.spec import StageResult, StageSpec, stored_results


@dataclass(frozen=True)
class TransferOutcome:
    """What a finished run is reported from; `final` names the stage behind each row and repeat."""

    plan: TransferPlan
    stages: dict[str, StageResult]
    decisions: dict[tuple[str, int], GuardDecision]
    trials: dict[tuple[str, int], list[StageResult]]
    final: dict[tuple[str, int], str]
    generation: list[StageProgress]
    readers: dict[str, str]  # training stage -> the shards it reads
    quality: GeneratorQuality | None
    peak_memory_bytes: int


def run_transfer(job: TransferJob, attempt: Attempt, progress: Progress) -> TransferOutcome:
    """Run the job, or go on with what an earlier start has committed.

    Raises:
        DistTLError: a named error; what is committed stays.
    """
    plan = TransferPlan(job, _known_source(job, attempt.store), check_target(job))
    plan.check()
    with open_workers(
        job, attempt, progress, generators=job.generators, trials=job.trials
    ) as workers:
        if isinstance(job.source, SourceConfig) and find_source(attempt.store) is None:
            plan = replace(plan, source=_train_source(plan, job.source, workers))
        for spec in plan.generate_stages():
            _start_generation(plan, spec, workers)
        return _run_arms(plan, workers)


def _known_source(job: TransferJob, store: ObjectStore) -> SourceFacts:
    """What is known before anything starts; source data is opened only if it is still needed."""
    if not isinstance(job.source, SourceConfig):
        return open_assets(store, job.source)
    return find_source(store) or planned_facts(job.source, job.seed)


def _train_source(plan: TransferPlan, source: SourceConfig, workers: Workers) -> SourceFacts:
    references: list[StageSpec] = []
    if any(arm.route == "real_source" for arm in plan.job.arms):
        references = [plan.real_source_trunk(repeat) for repeat in plan.seeds]
    return train_source(plan.job, source, workers, references=references)


def _start_generation(plan: TransferPlan, spec: GenerateSpec, workers: Workers) -> None:
    open_generate_stage(
        workers.store, spec, _conditions(plan, spec, workers.store), created_by=versions()
    )
    workers.generate(spec, batch_size=plan.read_batch_size(spec))


def _conditions(plan: TransferPlan, spec: GenerateSpec, store: ObjectStore) -> Tensor | None:
    if not isinstance(spec.draw, ByTarget):
        return None
    [repeat] = [r for r in plan.seeds if plan.repeat_seed(r) == spec.seed]
    images = load_rows(plan.rows(repeat, "train")).tensor()
    classifier = load_classifier(store, plan.source.classifier)
    return source_probabilities(classifier, images, temperature=spec.draw.condition.temperature)


def _run_arms(plan: TransferPlan, workers: Workers) -> TransferOutcome:
    """Train all arms; a repeat's guards run beside the arms of the next.

    The first trunk reads pseudo samples while they are still being made. Guards start after the
    arms whose samples they share: only trainers tell the generators how far readers are.
    """
    guards = [Guard(plan, arm, repeat) for arm in plan.pseudo_arms() for repeat in plan.seeds]
    guards = [guard for guard in guards if guard.num_folds]
    stages = stored_results(workers.store, SOURCE_STAGES + _reference_names(plan))
    for repeat in plan.seeds:
        arms = [plan.arm(arm, repeat) for arm in plan.job.arms]
        _train(workers, [*plan.trunks(repeat), *arms], stages)
        for guard in guards:
            if guard.repeat == repeat:
                guard.start(workers)
    workers.finish_generation()
    trials = _trials(guards, workers)
    decisions = _decide(plan, guards, trials)
    final = _final_stages(plan, decisions, workers, stages)
    return TransferOutcome(
        plan=plan,
        stages=stages,
        decisions=decisions,
        trials={key: [r for runs in by.values() for r in runs] for key, by in trials.items()},
        final=final,
        generation=workers.generation,
        readers=_readers(plan),
        quality=_quality(plan, workers),
        peak_memory_bytes=workers.session.peak_memory_bytes,
    )


def _train(workers: Workers, specs: list[StageSpec], stages: dict[str, StageResult]) -> None:
    new = list({spec.name: spec for spec in specs if spec.name not in stages}.values())
    for spec, result in zip(new, workers.train(new), strict=True):
        stages[spec.name] = result


@dataclass(frozen=True)
class Guard:
    """The cross-validation that decides on one arm's lambda in one repeat."""

    plan: TransferPlan
    arm: ArmConfig
    repeat: int

    @property
    def config(self) -> GuardConfig | None:
        """The guard's settings; None where it is off."""
        guard = self.plan.p_ssl(self.arm).loss.lambda_guard
        return guard if isinstance(guard, GuardConfig) else None

    @property
    def weights(self) -> tuple[float, ...]:
        """The lambdas that are compared."""
        assert self.config is not None, "weights are asked of guards that have folds"
        return self.config.candidates(self.plan.p_ssl(self.arm).loss.weight)

    @property
    def num_folds(self) -> int:
        """Folds of the cross-validation; 0 where the guard is off or has too few labels."""
        if self.config is None:
            return 0
        labels = load_rows(self.plan.rows(self.repeat, "train")).labels
        return num_guard_folds(labels, self.config) or 0

    def specs(self, weight: float) -> list[StageSpec]:
        """The runs of one lambda, a fold each."""
        folds = self.num_folds
        return [
            self.plan.guard_stage(self.arm, self.repeat, weight, fold, folds)
            for fold in range(folds)
        ]

    def start(self, workers: Workers) -> None:
        """Start all runs; each lambda's in a worker of its own."""
        for weight in self.weights:
            workers.start_trials(self._ticket(weight), self.specs(weight))

    def results(self, workers: Workers) -> dict[float, list[StageResult]]:
        """The runs of each lambda, waited for."""
        return {w: workers.trial_results(self._ticket(w)) for w in self.weights}

    def _ticket(self, weight: float) -> str:
        return f"{self.arm.name}-seed{self.repeat}-w{weight:g}"


Trials = dict[tuple[str, int], dict[float, list[StageResult]]]


def _trials(guards: list[Guard], workers: Workers) -> Trials:
    found: Trials = {}
    for guard in guards:
        found[guard.arm.name, guard.repeat] = guard.results(workers)
        workers.progress.update("lambda guards", len(found), len(guards))
    return found


def _decide(
    plan: TransferPlan, guards: list[Guard], trials: Trials
) -> dict[tuple[str, int], GuardDecision]:
    decisions = {}
    for arm in plan.pseudo_arms():
        loss = plan.p_ssl(arm).loss
        for repeat in plan.seeds:
            off = loss.lambda_guard == "off"
            reason = "the guard is off" if off else "a class has one label only"
            decisions[arm.name, repeat] = unguarded(loss.weight, reason)
    for guard in guards:
        key = guard.arm.name, guard.repeat
        correct = {
            weight: [float(right) for run in runs for right in run.correct]
            for weight, runs in trials[key].items()
        }
        decisions[key] = choose_lambda(correct)
    return decisions


def _final_stages(
    plan: TransferPlan,
    decisions: dict[tuple[str, int], GuardDecision],
    workers: Workers,
    stages: dict[str, StageResult],
) -> dict[tuple[str, int], str]:
    """The stage whose model each arm and repeat ends with; trains what a guard chose anew."""
    final = {}
    for arm in plan.job.arms:
        for repeat in plan.seeds:
            spec = plan.arm(arm, repeat)
            decision = decisions.get((arm.name, repeat))
            if decision is not None and decision.weight != plan.p_ssl(arm).loss.weight:
                spec = plan.arm(_without_pseudo(arm), repeat)
                if decision.weight > 0:
                    spec = plan.arm(arm, repeat, weight=decision.weight)
                _train(workers, [spec], stages)
            final[arm.name, repeat] = spec.name
    return final


def _without_pseudo(arm: ArmConfig) -> ArmConfig:
    """The arm that an arm with lambda = 0 equals bit for bit."""
    name = "pp" if arm.route == "pp_p_ssl" else "scratch"
    return ArmConfig(name=name, route=name)


def _reference_names(plan: TransferPlan) -> tuple[str, ...]:
    if not any(arm.route == "real_source" for arm in plan.job.arms):
        return ()
    return tuple(plan.real_source_trunk(repeat).name for repeat in plan.seeds)


def _readers(plan: TransferPlan) -> dict[str, str]:
    found = {}
    for spec in plan.training_stages():
        for rows in (spec.labelled, spec.unlabelled):
            if isinstance(rows, ShardPlan):
                found[spec.name] = rows.stage
    return found


def _quality(plan: TransferPlan, workers: Workers) -> GeneratorQuality | None:
    with_labels = [spec for spec in plan.generate_stages() if spec.name == PP_SHARDS]
    if not with_labels:
        return None
    return judge_generator(workers.store, plan.source, with_labels[0])
