"""Runs a hub job: trains experts, single fine-tunings and hubs, then evaluates all arms."""

from dataclasses import dataclass

from dist_tl.jobs.hub import tasks
from dist_tl.jobs.hub.plan import HubPlan
from dist_tl.jobs.hub.tasks import EvaluateOutput, TaskOutput, TimeOutput
from dist_tl.jobs.workers import Workers
from dist_tl.shards.manifest import open_stage
from dist_tl.train.spec import StageResult, StageSpec


@dataclass(frozen=True)
class HubOutcome:
    """Results of all trainings and tasks.

    Attributes:
        stages: result of every training, by stage name.
        best: the single expert that validation selects, by repeat.
        evaluations: by arm and repeat.
    """

    plan: HubPlan
    stages: dict[str, StageResult]
    best: tuple[str, ...]
    evaluations: dict[tuple[str, int], EvaluateOutput]
    timing: TimeOutput


def run(plan: HubPlan, workers: Workers) -> HubOutcome:
    """Runs all stages and tasks without a stored result.

    Raises:
        DistTLError: the named error of a stage or task; finished ones are kept.
    """
    experts = workers.train_apart("experts", plan.pretraining())
    stages = {result.name: result for result in experts}
    if plan.job.warm_start:
        phase = "cached features"
        workers.run_tasks(phase, tasks.compute_features, plan.features_tasks(), TaskOutput)
        for manifest in plan.manifests():
            open_stage(workers.store, manifest)
        workers.run_tasks("cached rows", tasks.write_rows, plan.rows_tasks(), TaskOutput)
    best = tuple(_train_repeat(plan, repeat, workers, stages) for repeat in range(plan.job.seeds))
    evaluations = plan.evaluation_tasks()
    outputs = workers.run_tasks("evaluation", tasks.evaluate, evaluations, EvaluateOutput)
    timings = [plan.timing_task(best[0])]
    [timing] = workers.run_tasks("timing", tasks.measure_time, timings, TimeOutput)
    keys = [(task.inputs.arm.name, task.inputs.repeat) for task in evaluations]
    return HubOutcome(plan, stages, best, dict(zip(keys, outputs, strict=True)), timing)


def _train_repeat(
    plan: HubPlan, repeat: int, workers: Workers, stages: dict[str, StageResult]
) -> str:
    """Trains all arms of a repeat; returns the single expert with the best validation accuracy."""
    picks = plan.singles(repeat, pick=True)
    _train(workers, [*plan.warm_starts(repeat), *picks, *plan.singles(repeat)], stages)
    accuracies = [stages[spec.name].accuracy for spec in picks]
    # The first expert of several with equal accuracy.
    best = plan.job.hub[accuracies.index(max(accuracies))].name
    _train(workers, plan.arms(repeat, best=best), stages)
    return best


def _train(workers: Workers, specs: list[StageSpec], stages: dict[str, StageResult]) -> None:
    stages.update((result.name, result) for result in workers.train(specs))
