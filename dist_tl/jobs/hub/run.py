"""The hub job: experts, single ones fine-tuned, hubs trained, all of it measured. Wiring only."""

from dataclasses import dataclass

from dist_tl.jobs.hub.features import (
    FeaturesOutput,
    RowsOutput,
    compute_features,
    write_rows,
)
from dist_tl.jobs.hub.plan import HubPlan
from dist_tl.jobs.hub.spec import HubJob
from dist_tl.jobs.hub.tasks import (
    EvaluateOutput,
    TimeOutput,
    evaluate,
    measure_time,
)
from dist_tl.jobs.hub.warm_start import WarmPlan, warm_plan
from dist_tl.jobs.workers import Workers, open_workers
from dist_tl.shards.manifest import open_stage
from dist_tl.storage.attempts import Attempt
from dist_tl.telemetry import Progress
from dist_tl.train.spec import StageResult, StageSpec


@dataclass(frozen=True)
class HubOutcome:
    """What all trainings and measurements came to.

    Attributes:
        stages: results of every training, by stage name.
        best: of each repeat, the expert that validation picked.
        evaluations: by (arm, repeat).
    """

    plan: HubPlan
    stages: dict[str, StageResult]
    best: tuple[str, ...]
    evaluations: dict[tuple[str, int], EvaluateOutput]
    timing: TimeOutput
    peak_memory_bytes: int


def run_hub(job: HubJob, attempt: Attempt, progress: Progress) -> HubOutcome:
    """Run every stage and task that is not done yet.

    Raises:
        ConfigError: the job cannot work; nothing was started.
        DistTLError: the named error that a stage met; what is done stays done.
    """
    plan = HubPlan(job, attempt.store)
    plan.check()
    with open_workers(job, attempt, progress, trials=job.trials) as workers:
        stages: dict[str, StageResult] = {}
        _pretrain(workers, plan.pretraining(), stages)
        if (warm := warm_plan(plan)) is not None:
            _cache_features(warm, workers)
        best = tuple(_train_repeat(plan, repeat, workers, stages) for repeat in range(job.seeds))
        answers = workers.run("evaluation", evaluate, plan.evaluations(), EvaluateOutput)
        [times] = workers.run("timing", measure_time, [plan.timing(best[0])], TimeOutput)
        memory = workers.session.peak_memory_bytes
    keys = [
        (arm.name, repeat)
        for arm in job.arms
        for repeat in range(job.seeds)
        if arm.route in ("pathway", "ensemble")
    ]
    return HubOutcome(
        plan=plan,
        stages=stages,
        best=best,
        evaluations=dict(zip(keys, answers, strict=True)),
        timing=times,
        peak_memory_bytes=memory,
    )


def _pretrain(workers: Workers, specs: list[StageSpec], stages: dict[str, StageResult]) -> None:
    """Experts do not wait for each other: one worker each."""
    for spec in specs:
        workers.start_trials(spec.name, [spec])
    for done, spec in enumerate(specs, 1):
        [stages[spec.name]] = workers.trial_results(spec.name)
        workers.progress.update("experts", done, len(specs), spec.name)


def _cache_features(warm: WarmPlan, workers: Workers) -> None:
    workers.run("cached features", compute_features, warm.features(), FeaturesOutput)
    for manifest in warm.manifests():
        open_stage(workers.store, manifest)
    workers.run("cached rows", write_rows, warm.cached_rows(), RowsOutput)


def _train_repeat(
    plan: HubPlan, repeat: int, workers: Workers, stages: dict[str, StageResult]
) -> str:
    """Train all arms of a repeat; the expert that validation picked."""
    picks = plan.picks(repeat)
    warm = warm_plan(plan)
    starts = warm.starts(repeat) if warm else []
    _train(workers, [*starts, *picks, *plan.singles(repeat)], stages)
    names = [expert.name for expert in plan.job.hub]
    # On equal accuracy the first of the hub.
    scores = [stages[spec.name].accuracy for spec in picks]
    best = names[scores.index(max(scores))]
    _train(workers, [plan.arm(arm, repeat, best=best) for arm in plan.model_arms()], stages)
    return best


def _train(workers: Workers, specs: list[StageSpec], stages: dict[str, StageResult]) -> None:
    for spec, result in zip(specs, workers.train(specs), strict=True):
        stages[spec.name] = result
