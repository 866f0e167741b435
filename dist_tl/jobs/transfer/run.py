"""Runs a transfer job: source, pseudo samples, arms and lambda guards."""

from dataclasses import dataclass, replace

from torch import Tensor

from dist_tl.cluster.generators import StageProgress
from dist_tl.jobs.source.plan import SOURCE_STAGES, SourceFacts, find_source
from dist_tl.jobs.source.run import judge_generator, train_source
from dist_tl.jobs.source.spec import SourceConfig
from dist_tl.jobs.stage_records import training_record
from dist_tl.jobs.stages import repeat_seed
from dist_tl.jobs.transfer.plan import PP_SHARDS, Guard, TransferPlan
from dist_tl.jobs.transfer.spec import ArmConfig
from dist_tl.jobs.versions import versions
from dist_tl.jobs.workers import Workers
from dist_tl.methods.pseudo.conditions import source_probabilities
from dist_tl.methods.pseudo.guard import GuardDecision, choose_lambda, unguarded
from dist_tl.report.results import GeneratorQuality
from dist_tl.shards.drawing import ByTarget, GenerateSpec, open_generate_stage
from dist_tl.shards.order import ShardPlan
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.models import load_classifier
from dist_tl.train.rows import load_rows
from dist_tl.train.spec import StageResult, StageSpec, stored_results

Decisions = dict[tuple[str, int], GuardDecision]
Trials = dict[tuple[str, int], dict[float, list[StageResult]]]


@dataclass(frozen=True)
class TransferOutcome:
    """Results of all stages, by arm and repeat.

    Attributes:
        stages: by stage name.
        final: the stage whose model each arm and repeat ends with.
        readers: the shards that a training stage reads, by stage name.
    """

    plan: TransferPlan
    stages: dict[str, StageResult]
    decisions: Decisions
    trials: dict[tuple[str, int], list[StageResult]]
    final: dict[tuple[str, int], str]
    generation: list[StageProgress]
    readers: dict[str, str]
    quality: GeneratorQuality | None


def run(plan: TransferPlan, workers: Workers) -> TransferOutcome:
    """Runs every stage that has no result yet.

    The first trunk reads pseudo samples while they are still being generated. The guards of a
    repeat run next to the arms of the following one; they start after the arms whose samples they
    share, because only trainers report to the generators how far they have read.

    Raises:
        DistTLError: a named error; finished stages are kept.
    """
    plan = replace(plan, source=_source(plan, workers))
    for spec in plan.generate_stages():
        _start_generation(plan, spec, workers)
    guards, stages = plan.guards(), _source_results(plan, workers)
    for repeat in plan.seeds:
        arms = [plan.arm(arm, repeat) for arm in plan.job.arms]
        _train(workers, [*plan.trunks(repeat), *arms], stages)
        for guard in guards:
            if guard.repeat == repeat:
                _start_guard(plan, guard, workers)
    workers.finish_generation()
    trials = _guard_results(guards, workers)
    decisions = _decide(plan, guards, trials)
    return TransferOutcome(
        plan=plan,
        stages=stages,
        decisions=decisions,
        trials={key: [r for runs in by.values() for r in runs] for key, by in trials.items()},
        final=_final_stages(plan, decisions, workers, stages),
        generation=workers.generation,
        readers=_readers(plan),
        quality=_quality(plan, workers.store),
    )


def _source(plan: TransferPlan, workers: Workers) -> SourceFacts:
    """The source of the plan, trained first if it has to be."""
    source = plan.job.source
    if not isinstance(source, SourceConfig):
        return plan.source
    stored = find_source(workers.store)
    return stored or train_source(plan.job, source, workers, references=plan.references())


def _source_results(plan: TransferPlan, workers: Workers) -> dict[str, StageResult]:
    """Results of the stages that read source data; an earlier attempt may have trained them."""
    references = tuple(spec.name for spec in plan.references())
    stages = stored_results(workers.store, SOURCE_STAGES + references)
    for result in stages.values():
        workers.record(training_record(result, "train"))
    return stages


def _start_generation(plan: TransferPlan, spec: GenerateSpec, workers: Workers) -> None:
    conditions = _conditions(plan, spec, workers.store)
    open_generate_stage(workers.store, spec, conditions, created_by=versions())
    workers.generate(spec, batch_size=plan.read_batch_size(spec))


def _conditions(plan: TransferPlan, spec: GenerateSpec, store: ObjectStore) -> Tensor | None:
    if not isinstance(spec.draw, ByTarget):
        return None
    [repeat] = [r for r in plan.seeds if repeat_seed(plan.job, r) == spec.seed]
    images = load_rows(plan.rows(repeat, "train")).tensor()
    classifier = load_classifier(store, plan.source.classifier)
    return source_probabilities(classifier, images, temperature=spec.draw.condition.temperature)


def _train(workers: Workers, specs: list[StageSpec], stages: dict[str, StageResult]) -> None:
    new = list({spec.name: spec for spec in specs if spec.name not in stages}.values())
    for spec, result in zip(new, workers.train(new), strict=True):
        stages[spec.name] = result


# Lambda guards.


def _start_guard(plan: TransferPlan, guard: Guard, workers: Workers) -> None:
    """Starts all trainings of a guard, those of one lambda in a worker of their own."""
    for weight in guard.weights:
        workers.start_trials(guard.trial(weight), plan.guard_stages(guard, weight))


def _guard_results(guards: list[Guard], workers: Workers) -> Trials:
    results: Trials = {}
    for guard in guards:
        results[guard.arm.name, guard.repeat] = {
            weight: workers.trial_results(guard.trial(weight)) for weight in guard.weights
        }
        workers.progress.update("lambda guards", len(results), len(guards))
    return results


def _decide(plan: TransferPlan, guards: list[Guard], trials: Trials) -> Decisions:
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
            weight: [float(right) for result in results for right in result.correct]
            for weight, results in trials[key].items()
        }
        decisions[key] = choose_lambda(correct)
    return decisions


def _final_stages(
    plan: TransferPlan, decisions: Decisions, workers: Workers, stages: dict[str, StageResult]
) -> dict[tuple[str, int], str]:
    """The final stage of each arm and repeat; trains anew with the lambda that a guard chose."""
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


# Figures of the shards.


def _readers(plan: TransferPlan) -> dict[str, str]:
    readers = {}
    for spec in plan.training_stages():
        for rows in (spec.labelled, spec.unlabelled):
            if isinstance(rows, ShardPlan):
                readers[spec.name] = rows.stage
    return readers


def _quality(plan: TransferPlan, store: ObjectStore) -> GeneratorQuality | None:
    labelled = [spec for spec in plan.generate_stages() if spec.name == PP_SHARDS]
    return judge_generator(store, plan.source, labelled[0]) if labelled else None
