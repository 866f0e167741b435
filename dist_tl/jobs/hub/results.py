"""Summarises a hub run: scores, routes, costs, and whether routing by input improves accuracy."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_tl.jobs.comparisons import against, paired_gain, percent_points
from dist_tl.jobs.hub.run import HubOutcome
from dist_tl.jobs.hub.spec import BASELINE, HubArmConfig
from dist_tl.methods.hub.evaluation import group_means
from dist_tl.report.results import (
    ArmSummary,
    Chart,
    Comparison,
    HeatMap,
    Score,
    Table,
    error_bars,
    summarise,
)
from dist_tl.train.rows import load_rows

CHOICES = {"input": "a router chooses", "static": "one choice for all", "random": "chance"}


def results(outcome: HubOutcome) -> Comparison:
    """Returns the scores, routes and costs of a finished run."""
    scores = tuple(_scores(outcome))
    # The test accuracy of every single expert is not available when one has to be selected.
    references = tuple(f"single {expert.name}" for expert in outcome.plan.job.hub)
    picked = [f"{name} {count}x" for name, count in Counter(outcome.best).most_common()]
    notes = {BASELINE: f"picked: {', '.join(picked)}"}
    for arm in outcome.plan.job.pathways():
        notes[arm.name] = f"k = {arm.routes.k}, {CHOICES[arm.routes.by]}"
    summaries = summarise(scores, baseline=BASELINE, references=references, notes=notes)
    return Comparison(
        baseline=BASELINE,
        references=references,
        scores=scores,
        summaries=summaries,
        tables=(_cost_table(outcome), *_domain_tables(outcome)),
        charts=(_cost_chart(outcome, summaries),),
        heat_maps=tuple(_usage_maps(outcome)),
        findings=tuple(_findings(outcome, scores)),
    )


# Scores.


def _scores(outcome: HubOutcome) -> Iterator[Score]:
    plan, stages = outcome.plan, outcome.stages
    for arm in plan.job.arms:
        for repeat, best in enumerate(outcome.best):
            needed = list(plan.models(arm, repeat, best=best))
            correct = stages[needed[-1]].correct
            if arm.route == "ensemble":
                correct = outcome.evaluations[arm.name, repeat].correct
            elif arm.route in ("best_single", "distilled"):
                before = plan.singles(repeat, pick=arm.route == "best_single")
                needed = [*(spec.name for spec in before), *needed]
            yield _score(outcome, arm.name, repeat, correct, needed)
    for expert in plan.job.hub:
        for repeat in range(plan.job.seeds):
            name = f"single-{expert.name}-seed{repeat}"
            yield _score(outcome, f"single {expert.name}", repeat, stages[name].correct, [name])


def _score(
    outcome: HubOutcome, arm: str, repeat: int, correct: Sequence[bool], needed: list[str]
) -> Score:
    """Scores an arm; `needed` are the stages to train for it, except warm starts."""
    names = [*needed, *(f"warm-{name}" for name in needed)]
    stages = [outcome.stages[name] for name in names if name in outcome.stages]
    return Score(
        arm=arm,
        seed=repeat,
        accuracy=sum(correct) / len(correct),
        correct=sum(correct),
        total=len(correct),
        seconds=sum(stage.seconds for stage in stages),
        samples=sum(stage.samples for stage in stages),
    )


# Routes.


def _selective(outcome: HubOutcome) -> list[HubArmConfig]:
    """Returns the arms that select some of the experts by input."""
    job = outcome.plan.job
    return [a for a in job.pathways() if a.routes.by == "input" and a.routes.k < len(job.hub)]


def _evaluated(outcome: HubOutcome, arm: HubArmConfig, field: str) -> NDArray[Any]:
    """Returns a field of the arm's evaluations, (repeats, ...)."""
    repeats = range(outcome.plan.job.seeds)
    return np.array([getattr(outcome.evaluations[arm.name, repeat], field) for repeat in repeats])


def _usage_maps(outcome: HubOutcome) -> Iterator[HeatMap]:
    rows = load_rows(outcome.plan.rows(0, "test"))
    groupings = [("class", rows.labels, rows.class_names)]
    if rows.domains is not None:
        groupings.insert(0, ("domain", rows.domains, rows.domain_names))
    for arm in _selective(outcome):
        used = _evaluated(outcome, arm, "weights") > 0
        for name, groups, labels in groupings:
            shares = 100 * group_means(used, groups, len(labels))
            yield HeatMap(
                title=f"{arm.name}: which experts see which {name}",
                x_label="expert",
                y_label=name,
                x=tuple(expert.name for expert in outcome.plan.job.hub),
                y=tuple(labels),
                values=tuple(map(tuple, shares.tolist())),
                signed=False,
                note=f"Per cent of the test images of each {name} that pass through the expert, "
                "over all seeds.",
            )


def _domain_tables(outcome: HubOutcome) -> Iterator[Table]:
    rows = load_rows(outcome.plan.rows(0, "test"))
    if rows.domains is None:
        return
    header, count = ["domain", "test images"], len(rows.domain_names)
    columns = [list(rows.domain_names), [str((rows.domains == i).sum()) for i in range(count)]]
    for arm in _selective(outcome):
        header += [f"{arm.name}: most used expert", "accuracy %"]
        shares = group_means(_evaluated(outcome, arm, "weights") > 0, rows.domains, count)
        tops = [(outcome.plan.job.hub[row.argmax()].name, row.max()) for row in shares]
        columns.append([f"{expert} ({share:.0%})" for expert, share in tops])
        correct = group_means(_evaluated(outcome, arm, "correct"), rows.domains, count)
        columns.append([percent_points(accuracy) for accuracy in correct])
    yield Table(
        title="Which expert serves which domain",
        header=tuple(header),
        rows=tuple(zip(*columns, strict=True)),
        note="Shares of the domain's test images that pass through the expert, over all seeds.",
    )


# Cost.


def _cost(outcome: HubOutcome, arm: HubArmConfig) -> float:
    """Returns million multiply-adds per image, mean over repeats."""
    if arm.route in ("pathway", "ensemble"):
        return float(_evaluated(outcome, arm, "multiply_adds").mean()) / 1e6
    return outcome.timing.multiply_adds[arm.name] / 1e6


def _cost_table(outcome: HubOutcome) -> Table:
    times = outcome.timing.microseconds
    device = "on a GPU" if outcome.plan.job.trials.gpus else "on one thread"
    return Table(
        title="Cost of a prediction",
        header=("arm", "million multiply-adds an image", "microseconds an image"),
        rows=tuple(
            (arm.name, f"{_cost(outcome, arm):,.3f}", f"{times[arm.name]:,.0f}")
            for arm in outcome.plan.job.arms
        ),
        note=f"Counted while running; time {device} in batches of 256, the fastest of five passes "
        "over the test split.",
    )


def _cost_chart(outcome: HubOutcome, summaries: Sequence[ArmSummary]) -> Chart:
    accuracies = {summary.arm: summary.accuracy for summary in summaries}
    return Chart(
        title="Accuracy against cost",
        x_label="million multiply-adds an image",
        y_label="accuracy, %",
        series=tuple(
            error_bars(arm.name, [_cost(outcome, arm)], [accuracies[arm.name]], color=color)
            for color, arm in enumerate(outcome.plan.job.arms)
        ),
        note="Up and to the left is better. Bars: 95 % intervals over seeds.",
    )


# Findings.


def _findings(outcome: HubOutcome, scores: Sequence[Score]) -> Iterator[str]:
    by_arm: dict[str, dict[int, float]] = {}
    for score in scores:
        by_arm.setdefault(score.arm, {})[score.seed] = score.accuracy
    controls = [arm for arm in outcome.plan.job.pathways() if arm.routes.by != "input"]
    others = [arm for arm in outcome.plan.job.arms if arm.route != "pathway"]
    for arm in _selective(outcome):
        for other in (*others, *controls):
            yield against(arm.name, other.name, by_arm)
    for arm in _selective(outcome):
        names = [control.name for control in controls if control.routes.k == arm.routes.k]
        gains = [paired_gain(arm.name, name, by_arm) for name in names]
        better = all(gain.excludes_zero and gain.mean > 0 for gain in gains)
        verdict = f"{'beat' if better else 'did not clearly beat'} {' and '.join(names)}"
        if not names:
            verdict = "was not compared with static or random routes"
        yield f"Choosing by input ({arm.name}) {verdict} at k = {arm.routes.k}."
    yield (
        "All seeds share one hub and one test split; the intervals cover labels, fresh weights "
        "and order, not those."
    )
