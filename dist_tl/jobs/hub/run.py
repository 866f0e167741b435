"""Runs a hub job: experts, single fine-tunings, hubs, and their measurement."""

from dataclasses import dataclass

from dist_tl.jobs.hub.features import FeaturesOutput, RowsOutput, compute_features, write_rows
from dist_tl.jobs.hub.plan import HubPlan
from dist_tl.jobs.hub.tasks import EvaluateOutput, TimeOutput, evaluate, measure_time
from dist_tl.jobs.hub.warm_start import WarmStart
from dist_tl.jobs.workers import Workers
from dist_tl.shards.manifest import open_stage
from dist_tl.train.spec import StageResult, StageSpec


@dataclass(frozen=True)
class HubOutcome:
    """Results of all trainings and measurements.

    Attributes:
        stages: results of every training, by stage name.
        best: the expert that validation picked, by repeat.
        evaluations: by (arm, repeat).
    """

    plan: HubPlan
    stages: dict[str, StageResult]
    best: tuple[str, ...]
    evaluations: dict[tuple[str, int], EvaluateOutput]
    timing: TimeOutput


def run(plan: HubPlan, workers: Workers) -> HubOutcome:
    """Runs every stage and task that has no output yet.

    Raises:
        DistTLError: the named error of a stage; finished stages and tasks are kept.
    """
    pretraining = plan.pretraining()
    experts = workers.train_apart("experts", pretraining)
    stages = {spec.name: result for spec, result in zip(pretraining, experts, strict=True)}
    if (warm := plan.warm_start) is not None:
        _cache_features(warm, workers)
    best = tuple(_train_repeat(plan, repeat, workers, stages) for repeat in range(plan.job.seeds))
    outputs = workers.run_tasks("evaluation", evaluate, plan.evaluations(), EvaluateOutput)
    [timing] = workers.run_tasks("timing", measure_time, [plan.timing(best[0])], TimeOutput)
    return HubOutcome(
        plan=plan,
        stages=stages,
        best=best,
        evaluations=dict(zip(plan.evaluation_keys(), outputs, strict=True)),
        timing=timing,
    )


def _cache_features(warm: WarmStart, workers: Workers) -> None:
    workers.run_tasks("cached features", compute_features, warm.features(), FeaturesOutput)
    for manifest in warm.manifests():
        open_stage(workers.store, manifest)
    workers.run_tasks("cached rows", write_rows, warm.cached_rows(), RowsOutput)


def _train_repeat(
    plan: HubPlan, repeat: int, workers: Workers, stages: dict[str, StageResult]
) -> str:
    """Trains all arms of a repeat; returns the expert that validation picks."""
    picks, warm = plan.picks(repeat), plan.warm_start
    starts = warm.starts(repeat) if warm else []
    _train(workers, [*starts, *picks, *plan.singles(repeat)], stages)
    names = [expert.name for expert in plan.job.hub]
    # On equal accuracy the first of the hub.
    accuracies = [stages[spec.name].accuracy for spec in picks]
    best = names[accuracies.index(max(accuracies))]
    _train(workers, [plan.arm(arm, repeat, best=best) for arm in plan.model_arms()], stages)
    return best


def _train(workers: Workers, specs: list[StageSpec], stages: dict[str, StageResult]) -> None:
    for spec, result in zip(specs, workers.train(specs), strict=True):
        stages[spec.name] = result
