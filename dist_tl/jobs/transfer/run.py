"""Runs a transfer job: source, pseudo samples, arms and lambda guards."""

from dataclasses import dataclass, replace

from torch import Tensor

from dist_tl.cluster.generators import StageProgress
from dist_tl.jobs.source.plan import SOURCE_STAGES
from dist_tl.jobs.source.run import judge_generator, trained_source
from dist_tl.jobs.stages import repeat_seed
from dist_tl.jobs.transfer.plan import Guard, TransferPlan
from dist_tl.jobs.versions import versions
from dist_tl.jobs.workers import Workers
from dist_tl.methods.pseudo.conditions import source_probabilities
from dist_tl.methods.pseudo.guard import GuardDecision, choose_lambda, unguarded
from dist_tl.report.results import GeneratorQuality
from dist_tl.shards.drawing import ByTarget, GenerateSpec, open_generate_stage
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.models import load_classifier
from dist_tl.train.rows import load_rows
from dist_tl.train.spec import StageResult, StageSpec, stored_results

ArmRepeat = tuple[str, int]
Decisions = dict[ArmRepeat, GuardDecision]
Trials = dict[ArmRepeat, dict[float, list[StageResult]]]


@dataclass(frozen=True)
class TransferOutcome:
    """Results of all stages.

    Attributes:
        stages: results by stage name.
        decisions: the lambda of each arm with pseudo samples, by arm and repeat.
        trials: results of the guards' trainings by arm and repeat, then by lambda.
        final: result of the stage whose model each arm keeps, by arm and repeat.
    """

    plan: TransferPlan
    stages: dict[str, StageResult]
    decisions: Decisions
    trials: Trials
    final: dict[ArmRepeat, StageResult]
    generation: list[StageProgress]
    quality: GeneratorQuality | None


def run(plan: TransferPlan, workers: Workers) -> TransferOutcome:
    """Runs every stage that has no result yet.

    The first trunk reads pseudo samples while they are still being generated. The guards of a
    repeat run next to the arms of the following one; they start after the arms whose samples they
    share, because only trainers report to the generators how far they have read.

    Raises:
        DistTLError: a named error; finished stages are kept.
    """
    job, store, references = plan.job, workers.store, plan.references()
    source = trained_source(job, job.source, plan.source, workers, references=references)
    plan = replace(plan, source=source)
    for spec in plan.generate_stages():
        open_generate_stage(store, spec, _conditions(plan, spec, store), created_by=versions())
        workers.generate(spec, batch_size=plan.read_batch_size(spec))
    stages = stored_results(store, [*SOURCE_STAGES, *(spec.name for spec in references)])
    guards = plan.guards()
    for repeat in plan.seeds:
        _train(workers, plan.repeat_stages(repeat), stages)
        for guard in guards:
            if guard.repeat == repeat:
                for specs in guard.trials.values():
                    workers.start_trials(specs[0].name, specs)
    workers.finish_generation()
    trials = _trial_results(guards, workers)
    decisions = _decide(plan, trials)
    final = {
        (arm.name, repeat): plan.final(arm, repeat, decisions.get((arm.name, repeat)))
        for arm in job.arms
        for repeat in plan.seeds
    }
    _train(workers, list(final.values()), stages)
    pp_shards = plan.pp_shards()
    return TransferOutcome(
        plan=plan,
        stages=stages,
        decisions=decisions,
        trials=trials,
        final={key: stages[spec.name] for key, spec in final.items()},
        generation=workers.generation,
        quality=None if pp_shards is None else judge_generator(store, source, pp_shards),
    )


def _conditions(plan: TransferPlan, spec: GenerateSpec, store: ObjectStore) -> Tensor | None:
    if not isinstance(spec.draw, ByTarget):
        return None
    [repeat] = [r for r in plan.seeds if repeat_seed(plan.job, r) == spec.seed]
    images = load_rows(plan.rows(repeat, "train")).tensor()
    classifier = load_classifier(store, plan.source.classifier)
    return source_probabilities(classifier, images, temperature=spec.draw.condition.temperature)


def _train(workers: Workers, specs: list[StageSpec], stages: dict[str, StageResult]) -> None:
    """Adds results to `stages`; stages that are in it already are not trained again."""
    new = list({spec.name: spec for spec in specs if spec.name not in stages}.values())
    stages.update({result.name: result for result in workers.train(new)})


def _trial_results(guards: list[Guard], workers: Workers) -> Trials:
    results: Trials = {}
    for guard in guards:
        results[guard.arm.name, guard.repeat] = {
            weight: workers.trial_results(specs[0].name) for weight, specs in guard.trials.items()
        }
        workers.progress.update("lambda guards", len(results), len(guards))
    return results


def _decide(plan: TransferPlan, trials: Trials) -> Decisions:
    decisions = {}
    for arm in plan.pseudo_arms():
        loss = plan.p_ssl(arm).loss
        is_off = loss.lambda_guard == "off"
        reason = "the guard is off" if is_off else "a class has one label only"
        for repeat in plan.seeds:
            correct = {
                weight: [right for result in results for right in result.correct]
                for weight, results in trials.get((arm.name, repeat), {}).items()
            }
            decision = choose_lambda(correct) if correct else unguarded(loss.weight, reason)
            decisions[arm.name, repeat] = decision
    return decisions
