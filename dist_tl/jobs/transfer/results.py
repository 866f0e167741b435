"""Results of a transfer run: scores, intervals, overlap and plain findings."""

from collections.abc import Iterator

from dist_tl.jobs.comparisons import against
from dist_tl.jobs.transfer.plan import TAUGHT, TEACHER, TRUNKS
from dist_tl.jobs.transfer.run import TransferOutcome
from dist_tl.jobs.transfer.spec import BASELINE, REFERENCES, ArmConfig
from dist_tl.report.results import Comparison, Score, summarise
from dist_tl.shards.order import ShardPlan
from dist_tl.train.spec import StageResult

UNGUARDED = " unguarded"
# Trainings whose cost an arm includes. The cost of the source is not: it exists already.
BUILDS_ON = {**TRUNKS, **dict.fromkeys(TAUGHT, TEACHER)}


def results(outcome: TransferOutcome) -> Comparison:
    """Scores, gains and plain findings of a finished run."""
    scores = tuple(_scores(outcome))
    references = tuple(arm.name for arm in outcome.plan.job.arms if arm.route in REFERENCES)
    notes = _notes(outcome)
    return Comparison(
        baseline=BASELINE,
        references=references,
        scores=scores,
        summaries=summarise(scores, baseline=BASELINE, references=references, notes=notes),
        quality=outcome.quality,
        overlap=_overlap(outcome),
        findings=tuple(_findings(outcome, scores, references)),
    )


def _scores(outcome: TransferOutcome) -> Iterator[Score]:
    plan = outcome.plan
    for arm in plan.job.arms:
        for repeat in plan.seeds:
            trials = outcome.trials.get((arm.name, repeat), {}).values()
            guard = [result for results in trials for result in results]
            yield _score(outcome, arm, repeat, arm.name, [outcome.final[arm.name, repeat], *guard])
        if any(name == arm.name for name, _ in outcome.trials):
            for repeat in plan.seeds:
                result = outcome.stages[plan.arm(arm, repeat).name]
                yield _score(outcome, arm, repeat, arm.name + UNGUARDED, [result])


def _score(
    outcome: TransferOutcome, arm: ArmConfig, repeat: int, row: str, trainings: list[StageResult]
) -> Score:
    """The score of the first training; the cost of all of them and of the trunk or teacher."""
    earlier = outcome.stages.get(f"{BUILDS_ON.get(arm.route)}-seed{repeat}")
    cost = trainings if earlier is None else [*trainings, earlier]
    return Score(
        arm=row,
        seed=repeat,
        accuracy=trainings[0].accuracy,
        correct=sum(trainings[0].correct),
        total=len(trainings[0].correct),
        seconds=sum(result.seconds for result in cost),
        samples=sum(result.samples for result in cost),
    )


def _notes(outcome: TransferOutcome) -> dict[str, str]:
    notes = {}
    for arm in outcome.plan.pseudo_arms():
        decisions = [outcome.decisions[arm.name, repeat] for repeat in outcome.plan.seeds]
        if not any(decision.guarded for decision in decisions):
            notes[arm.name] = f"unguarded: {decisions[0].reason}"
            continue
        kept = sum(decision.weight > 0 for decision in decisions)
        notes[arm.name] = f"guard kept lambda > 0 in {kept} of {len(decisions)} seeds"
        weight = outcome.plan.p_ssl(arm).loss.weight
        notes[arm.name + UNGUARDED] = f"lambda {weight:g} always"
    return notes


def _overlap(outcome: TransferOutcome) -> dict[str, float]:
    """Seconds that a stage had trained before the last shard it reads was committed."""
    last_commits = {stage.spec.name: stage.last_commit_at for stage in outcome.generation}
    overlap = {}
    for spec in outcome.plan.training_stages():
        began = outcome.stages[spec.name].first_step_at
        for rows in (spec.labelled, spec.unlabelled):
            last = last_commits.get(rows.stage) if isinstance(rows, ShardPlan) else None
            if last is not None and began is not None and last > began:
                overlap[spec.name] = round(last - began, 3)
    return overlap


def _findings(
    outcome: TransferOutcome, scores: tuple[Score, ...], references: tuple[str, ...]
) -> Iterator[str]:
    if (quality := outcome.quality) is not None:
        text = (
            f"The source classifier gives {quality.agreement:.1%} of {quality.samples} pseudo "
            "samples the class that they were generated for."
        )
        if quality.frechet is not None and quality.frechet_real is not None:
            text += (
                f" Frechet distance to real source images {quality.frechet:.3g}; "
                f"held-out real images are at {quality.frechet_real:.3g}."
            )
        yield text
    by_arm: dict[str, dict[int, float]] = {}
    for score in scores:
        by_arm.setdefault(score.arm, {})[score.seed] = score.accuracy
    for arm in by_arm:
        if arm != BASELINE and arm not in references:
            yield against(arm, BASELINE, by_arm)
    for left, right in (("pp", "real_source"), ("pp_p_ssl", "pp"), ("p_ssl", "real_unlabelled")):
        if left in by_arm and right in by_arm:
            yield against(left, right, by_arm)
    if quality is not None and len(by_arm) > 1:
        yield (
            "All seeds share one source, one generator and one set of pre-training samples; the "
            "intervals cover labels, weights, order and P-SSL samples, not those."
        )
