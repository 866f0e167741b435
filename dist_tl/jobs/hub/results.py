"""What a hub run found: scores, routes, costs, and whether choosing by input was worth it."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dist_tl.datasets.images import LabelledImages
from dist_tl.jobs.comparisons import against, paired_gain
from dist_tl.jobs.hub.run import HubOutcome
from dist_tl.jobs.hub.spec import BASELINE, HubArmConfig
from dist_tl.report.results import (
    Chart,
    Comparison,
    HeatMap,
    Score,
    Series,
    Table,
    interval,
    summarise,
)
from dist_tl.train.rows import load_rows
from dist_tl.train.spec import StageResult


def results(outcome: HubOutcome) -> Comparison:
    """Scores, routes and costs of a finished run."""
    scores = tuple(_scores(outcome))
    # Which single expert is best on the test split is not known to those who must choose.
    references = tuple(f"single {expert.name}" for expert in outcome.plan.job.hub)
    return Comparison(
        baseline=BASELINE,
        references=references,
        scores=scores,
        summaries=summarise(
            scores, baseline=BASELINE, references=references, notes=_notes(outcome)
        ),
        tables=(_cost_table(outcome), *_route_tables(outcome)),
        charts=(_cost_chart(outcome, scores),),
        heat_maps=tuple(_usage_maps(outcome)),
        findings=tuple(_findings(outcome, scores)),
    )


# Scores.


def _scores(outcome: HubOutcome) -> Iterator[Score]:
    repeats = range(outcome.plan.job.seeds)
    for arm in outcome.plan.job.arms:
        for repeat in repeats:
            yield _arm_score(outcome, arm, repeat)
    for expert in outcome.plan.job.hub:
        for repeat in repeats:
            result = outcome.stages[f"single-{expert.name}-seed{repeat}"]
            yield _score(f"single {expert.name}", repeat, result.correct, [result], outcome.stages)


def _arm_score(outcome: HubOutcome, arm: HubArmConfig, repeat: int) -> Score:
    plan, stages = outcome.plan, outcome.stages
    singles = [stages[spec.name] for spec in plan.singles(repeat)]
    if arm.route == "best_single":
        result = stages[f"single-{outcome.best[repeat]}-seed{repeat}"]
        picks = [stages[spec.name] for spec in plan.picks(repeat)]
        return _score(arm.name, repeat, result.correct, [*picks, result], stages)
    if arm.route == "ensemble":
        answer = outcome.evaluations[arm.name, repeat]
        return _score(arm.name, repeat, answer.correct, singles, stages)
    result = stages[f"{arm.name}-seed{repeat}"]
    before = singles if arm.route == "distilled" else []
    return _score(arm.name, repeat, result.correct, [*before, result], stages)


def _score(
    arm: str,
    repeat: int,
    correct: tuple[bool, ...],
    chain: list[StageResult],
    stages: dict[str, StageResult],
) -> Score:
    warm = [stages[f"warm-{p.name}"] for p in chain if f"warm-{p.name}" in stages]
    return Score(
        arm=arm,
        seed=repeat,
        accuracy=sum(correct) / len(correct),
        correct=sum(correct),
        total=len(correct),
        seconds=sum(part.seconds for part in [*chain, *warm]),
        samples=sum(part.samples for part in [*chain, *warm]),
    )


def _notes(outcome: HubOutcome) -> dict[str, str]:
    picked = Counter(outcome.best)
    words = [f"{name} {count}x" for name, count in picked.most_common()]
    notes = {BASELINE: f"picked: {', '.join(words)}"}
    for arm in outcome.plan.job.arms:
        if arm.route == "pathway":
            how = {"input": "a router chooses", "static": "one choice for all", "random": "chance"}
            notes[arm.name] = f"k = {arm.routes.k}, {how[arm.routes.by]}"
    return notes


# Routes.


def _hubs(outcome: HubOutcome) -> list[HubArmConfig]:
    """Arms whose routes depend on the input and leave some experts out."""
    count = len(outcome.plan.job.hub)
    return [
        arm
        for arm in outcome.plan.job.arms
        if arm.route == "pathway" and arm.routes.by == "input" and arm.routes.k < count
    ]


def _usage(outcome: HubOutcome, arm: HubArmConfig) -> NDArray[np.bool_]:
    """Whether an expert saw a test image: (repeats, images, experts)."""
    answers = [outcome.evaluations[arm.name, r] for r in range(outcome.plan.job.seeds)]
    return np.array([answer.weights for answer in answers]) > 0


def _test_rows(outcome: HubOutcome) -> LabelledImages:
    return load_rows(outcome.plan.rows(0, "test"))


def _usage_maps(outcome: HubOutcome) -> Iterator[HeatMap]:
    rows, experts = _test_rows(outcome), [e.name for e in outcome.plan.job.hub]
    for arm in _hubs(outcome):
        used = _usage(outcome, arm)
        groups = [("class", rows.labels, rows.class_names)]
        if rows.domains is not None:
            groups.insert(0, ("domain", rows.domains, rows.domain_names))
        for what, index, names in groups:
            shares = [100 * used[:, index == i].mean(axis=(0, 1)) for i in range(len(names))]
            yield HeatMap(
                title=f"{arm.name}: which experts see which {what}",
                x_label="expert",
                y_label=what,
                x=tuple(experts),
                y=tuple(names),
                values=tuple(tuple(float(v) for v in row) for row in shares),
                signed=False,
                note=f"Per cent of the test images of each {what} that pass through the expert, "
                "over all seeds.",
            )


def _route_tables(outcome: HubOutcome) -> Iterator[Table]:
    rows, experts = _test_rows(outcome), [e.name for e in outcome.plan.job.hub]
    if rows.domains is None:
        return
    arms = _hubs(outcome)
    correct = {
        arm.name: np.array(
            [outcome.evaluations[arm.name, r].correct for r in range(outcome.plan.job.seeds)]
        )
        for arm in arms
    }
    table = []
    for i, name in enumerate(rows.domain_names):
        cells = [name, str(int((rows.domains == i).sum()))]
        for arm in arms:
            inside = _usage(outcome, arm)[:, rows.domains == i].mean(axis=(0, 1))
            top = int(inside.argmax())
            accuracy = correct[arm.name][:, rows.domains == i].mean()
            cells += [f"{experts[top]} ({inside[top]:.0%})", f"{100 * accuracy:.1f}"]
        table.append(tuple(cells))
    header = ["domain", "test images"]
    for arm in arms:
        header += [f"{arm.name}: most used expert", "accuracy %"]
    yield Table(
        title="Which expert serves which domain",
        header=tuple(header),
        rows=tuple(table),
        note="Shares of the domain's test images that pass through the expert, over all seeds.",
    )


# Cost.


def _cost(outcome: HubOutcome, arm: HubArmConfig) -> float:
    """Multiply-adds of one image, mean over repeats."""
    repeats = range(outcome.plan.job.seeds)
    if arm.route in ("pathway", "ensemble"):
        return float(np.mean([outcome.evaluations[arm.name, r].multiply_adds for r in repeats]))
    return outcome.timing.multiply_adds[arm.name]


def _cost_table(outcome: HubOutcome) -> Table:
    rows = [
        (
            arm.name,
            f"{_cost(outcome, arm) / 1e6:,.3f}",
            f"{outcome.timing.microseconds[arm.name]:,.0f}",
        )
        for arm in outcome.plan.job.arms
    ]
    return Table(
        title="What an answer costs",
        header=("arm", "million multiply-adds an image", "microseconds an image"),
        rows=tuple(rows),
        note=f"Counted while running; time {_timed_on(outcome)} in batches of 256, the fastest of "
        "five passes over the test split.",
    )


def _timed_on(outcome: HubOutcome) -> str:
    return "on a GPU" if outcome.plan.job.trials.gpus else "on one thread"


def _cost_chart(outcome: HubOutcome, scores: tuple[Score, ...]) -> Chart:
    series = []
    for color, arm in enumerate(outcome.plan.job.arms):
        found = interval([100 * s.accuracy for s in scores if s.arm == arm.name])
        width = None if found.half_width is None else (found.half_width,)
        series.append(
            Series(
                label=arm.name,
                x=(_cost(outcome, arm) / 1e6,),
                y=(found.mean,),
                half_width=width,
                style="points",
                color=color,
            )
        )
    return Chart(
        title="Accuracy against cost",
        x_label="million multiply-adds an image",
        y_label="accuracy, %",
        series=tuple(series),
        note="Up and to the left is better. Bars: 95 % intervals over seeds.",
    )


# Findings.


def _findings(outcome: HubOutcome, scores: tuple[Score, ...]) -> Iterator[str]:
    by_arm: dict[str, dict[int, float]] = {}
    for score in scores:
        by_arm.setdefault(score.arm, {})[score.seed] = score.accuracy
    arms = outcome.plan.job.arms
    controls = [a.name for a in arms if a.route == "pathway" and a.routes.by != "input"]
    others = [a.name for a in arms if a.route != "pathway"]
    for arm in _hubs(outcome):
        for other in (*others, *controls):
            yield against(arm.name, other, by_arm)
    for arm in _hubs(outcome):
        same = [n for n in controls if _k(outcome, n) == arm.routes.k]
        gains = [paired_gain(arm.name, other, by_arm) for other in same]
        won = all(gain.excludes_zero and gain.mean > 0 for gain in gains)
        if gains:
            words = f"{'beat' if won else 'did not clearly beat'} {' and '.join(same)}"
        else:
            words = "was not compared with static or random routes"
        yield f"Choosing by input ({arm.name}) {words} at k = {arm.routes.k}."
    yield (
        "All seeds share one hub and one test split; the intervals cover labels, fresh weights "
        "and order, not those."
    )


def _k(outcome: HubOutcome, name: str) -> int:
    return next(arm.routes.k for arm in outcome.plan.job.arms if arm.name == name)
