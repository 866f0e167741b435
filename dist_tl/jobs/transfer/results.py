"""What a transfer run found: scores, intervals, timeline and plain findings."""

from collections.abc import Iterator

from dist_tl.jobs.comparisons import against
from dist_tl.jobs.transfer.plan import PP_SHARDS, TRUNKS
from dist_tl.jobs.transfer.run import TransferOutcome
from dist_tl.jobs.transfer.spec import BASELINE, REFERENCES, ArmConfig
from dist_tl.report.results import Comparison, Score, summarise
from dist_tl.train.spec import StageResult

UNGUARDED = " unguarded"


def results(outcome: TransferOutcome) -> Comparison:
    """Scores, gains and plain findings of a finished run."""
    scores = tuple(_scores(outcome))
    references = tuple(a.name for a in outcome.plan.job.arms if a.route in REFERENCES)
    return Comparison(
        baseline=BASELINE,
        references=references,
        scores=scores,
        summaries=summarise(
            scores, baseline=BASELINE, references=references, notes=_notes(outcome)
        ),
        quality=outcome.quality,
        overlap=_overlap(outcome),
        findings=tuple(_findings(outcome, scores)),
    )


def _scores(outcome: TransferOutcome) -> Iterator[Score]:
    for arm in outcome.plan.job.arms:
        for repeat in outcome.plan.seeds:
            yield _score(outcome, arm, repeat, outcome.final[arm.name, repeat], arm.name)
        if any(name == arm.name and d.guarded for (name, _), d in outcome.decisions.items()):
            for repeat in outcome.plan.seeds:
                stage = outcome.plan.arm(arm, repeat).name
                yield _score(outcome, arm, repeat, stage, arm.name + UNGUARDED)


def _score(outcome: TransferOutcome, arm: ArmConfig, repeat: int, stage: str, row: str) -> Score:
    result = outcome.stages[stage]
    chain = [result, *_before(outcome, arm, repeat)]
    if row == arm.name:
        chain += outcome.trials.get((arm.name, repeat), [])
    return Score(
        arm=row,
        seed=repeat,
        accuracy=result.accuracy,
        correct=sum(result.correct),
        total=len(result.correct),
        seconds=sum(part.seconds for part in chain),
        samples=sum(part.samples for part in chain),
    )


def _before(outcome: TransferOutcome, arm: ArmConfig, repeat: int) -> list[StageResult]:
    """The stages that the arm's own stage builds on, beside the source's."""
    trunks = {**TRUNKS, "distillation": "teacher", "logit_matching": "teacher"}
    # The source's own training is not counted: in the setting it exists already.
    name = f"{trunks[arm.route]}-seed{repeat}" if arm.route in trunks else None
    return [outcome.stages[name]] if name in outcome.stages else []


def _notes(outcome: TransferOutcome) -> dict[str, str]:
    notes = {}
    for arm in outcome.plan.pseudo_arms():
        weight = outcome.plan.p_ssl(arm).loss.weight
        decisions = [d for (name, _), d in outcome.decisions.items() if name == arm.name]
        if not any(decision.guarded for decision in decisions):
            notes[arm.name] = f"unguarded: {decisions[0].reason}"
            continue
        kept = sum(decision.weight > 0 for decision in decisions)
        notes[arm.name] = f"guard kept lambda > 0 in {kept} of {len(decisions)} seeds"
        notes[arm.name + UNGUARDED] = f"lambda {weight:g} always"
    return notes


def _overlap(outcome: TransferOutcome) -> dict[str, float]:
    """Seconds that a stage had trained before the last shard it reads was committed."""
    made = {stage.spec.name: stage.last_commit_at for stage in outcome.generation}
    overlap = {}
    for name, shards in outcome.readers.items():
        result, last = outcome.stages.get(name), made.get(shards)
        if result is not None and last is not None and result.first_step_at is not None:
            ahead = last - result.first_step_at
            if ahead > 0:
                overlap[name] = round(ahead, 3)
    return overlap


def _findings(outcome: TransferOutcome, scores: tuple[Score, ...]) -> Iterator[str]:
    quality = outcome.quality
    if quality is not None:
        text = (
            f"The source classifier gives {quality.agreement:.1%} of {quality.samples} pseudo "
            "samples the class that they were asked for."
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
        if arm != BASELINE and arm not in _reference_names(outcome):
            yield against(arm, BASELINE, by_arm)
    for left, right in (("pp", "real_source"), ("pp_p_ssl", "pp"), ("p_ssl", "real_unlabelled")):
        if left in by_arm and right in by_arm:
            yield against(left, right, by_arm)
    if any(stage.spec.name == PP_SHARDS for stage in outcome.generation) and len(by_arm) > 1:
        yield (
            "All seeds share one source, one generator and one set of pre-training samples; the "
            "intervals cover labels, weights, order and P-SSL samples, not those."
        )


def _reference_names(outcome: TransferOutcome) -> set[str]:
    return {arm.name for arm in outcome.plan.job.arms if arm.route in REFERENCES}
