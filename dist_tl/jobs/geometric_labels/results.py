"""Summarises a geometric labelling: arms with intervals, the labels, the divergence forecast."""

from collections.abc import Iterator

from dist_tl.jobs.comparisons import percent, percent_points, signed_percent
from dist_tl.jobs.geometric_labels.run import GeometricLabelsOutcome
from dist_tl.jobs.geometric_labels.spec import BASELINE
from dist_tl.methods.geometry.divergence import rank_forecast
from dist_tl.report.results import Chart, Interval, Series, Study, Table, interval
from dist_tl.seeds import numpy_rng

RIVALS = ("nearest_m", "kmeans", "random_labels", "human_labels")


def results(outcome: GeometricLabelsOutcome) -> Study:
    """Returns arms, labels and the divergence forecast, for the terminal and the report."""
    tables = [_arms_table(outcome), _labels_table(outcome)]
    charts = [_rates_chart(outcome)]
    findings = [
        f"{arm} {_compared(outcome, arm, rival)} {rival}."
        for arm in outcome.plan.job.g2l_arms
        for rival in RIVALS
        if rival in outcome.plan.job.arms
    ]
    if len(outcome.pairs) >= 3:
        tables.append(_pairs_table(outcome))
        charts.append(_pairs_chart(outcome))
        findings += _forecast_findings(outcome)
    return Study(
        findings=tuple(findings),
        verdict=_verdict(outcome),
        tables=tuple(tables),
        charts=tuple(charts),
        facts=tuple(_facts(outcome)),
    )


def _accuracies(outcome: GeometricLabelsOutcome, arm: str, rate: float) -> list[float]:
    repeats = range(outcome.plan.job.seeds)
    return [outcome.tuned[arm, rate, repeat].accuracy for repeat in repeats]


def _best(outcome: GeometricLabelsOutcome, arm: str) -> tuple[float, list[float]]:
    """Returns the rate with the best mean over repeats, and the accuracies at it."""
    swept = [(rate, _accuracies(outcome, arm, rate)) for rate in outcome.plan.job.rates]
    return max(swept, key=lambda item: interval(item[1]).mean)


def _gain(outcome: GeometricLabelsOutcome, arm: str, other: str) -> Interval:
    pairs = zip(_best(outcome, arm)[1], _best(outcome, other)[1], strict=True)
    return interval([a - b for a, b in pairs])


def _arms_table(outcome: GeometricLabelsOutcome) -> Table:
    job, rows = outcome.plan.job, []
    for arm in job.arms:
        rate, accuracies = _best(outcome, arm)
        gain, classes, loss = "baseline", "", ""
        if arm != BASELINE:
            gain = signed_percent(_gain(outcome, arm, BASELINE))
            classes = str(outcome.labellings[arm].num_classes)
            loss = f"{outcome.bases[arm].final_loss:.2f}"
        rows.append((arm, percent(interval(accuracies)), gain, f"{rate:g}", classes, loss))
    return Table(
        title="Accuracy on the target's test split, %",
        header=("arm", "accuracy", f"gain over {BASELINE}", "rate", "classes", "pre-training loss"),
        rows=tuple(rows),
        note=f"{job.seeds} seeds, 95 % intervals, gains paired by seed. Every arm at the "
        f"best of {len(job.rates)} learning rates by its mean, so all are a little too "
        "high, alike.",
    )


def _labels_table(outcome: GeometricLabelsOutcome) -> Table:
    job = outcome.plan.job
    rows = [
        (
            arm,
            str(len(table.class_of)),
            str(len(table.names)),
            f"{table.entropy:.2f}",
            f"{100 * table.largest_share:.0f}",
            str(table.merged),
            str(table.dropped),
            str(outcome.degenerate[arm]),
        )
        for arm, table in outcome.tables.items()
    ]
    return Table(
        title="Labels of the pool",
        header=(
            "labels",
            "distinct",
            "classes",
            "entropy, nats",
            "largest, %",
            "pooled",
            "dropped",
            "degenerate",
        ),
        rows=tuple(rows),
        note=f"m = {job.m} of {outcome.num_anchors} anchors; classes of fewer than "
        f"{job.rare.min_count} items: {job.rare.rare}.",
    )


def _verdict(outcome: GeometricLabelsOutcome) -> str:
    arms = outcome.plan.job.g2l_arms
    if not arms:
        return "No arm labels by geometry."
    best = max(arms, key=lambda arm: interval(_best(outcome, arm)[1]).mean)
    parts = [
        f"{_compared(outcome, best, rival)} {rival}"
        for rival in ("nearest_m", "kmeans")
        if rival in outcome.plan.job.arms
    ]
    gain = _gain(outcome, best, BASELINE)
    beat = "beats" if gain.excludes_zero and gain.mean > 0 else "does not clearly beat"
    sentence = f"G2L ({best}) {beat} {BASELINE} ({signed_percent(gain)} points)"
    return f"{sentence}; geometry {' and '.join(parts)}." if parts else f"{sentence}."


def _compared(outcome: GeometricLabelsOutcome, arm: str, other: str) -> str:
    gap = _gain(outcome, arm, other)
    if not gap.excludes_zero:
        return f"cannot be told ({signed_percent(gap)}) from"
    return f"is {'better' if gap.mean > 0 else 'worse'} ({signed_percent(gap)}) than"


def _forecast_findings(outcome: GeometricLabelsOutcome) -> Iterator[str]:
    forecast = rank_forecast(
        [pair.js for pair in outcome.pairs],
        [pair.error for pair in outcome.pairs],
        [pair.target for pair in outcome.pairs],
        rng=numpy_rng(outcome.plan.job.seed, "divergence bootstrap"),
    )
    text = (
        f"Over {forecast.pairs} (source, target) pairs the rank correlation of divergence and "
        f"error is {forecast.rho:+.2f}"
    )
    if forecast.low is None or forecast.high is None:
        text += "; too few pairs for an interval"
    else:
        text += f" (95 % bootstrap interval {forecast.low:+.2f} to {forecast.high:+.2f})"
        if forecast.low <= 0 <= forecast.high:
            text += "; nothing that could be told from noise"
    yield text + "."
    yield (
        "A linear fit to the pairs of all other targets is off by "
        f"{percent_points(forecast.left_out_error)} points of error on average."
    )


def _pairs_table(outcome: GeometricLabelsOutcome) -> Table:
    config = outcome.plan.job.pairs
    assert config is not None, "an outcome has pairs only if the job has"
    rows = [
        (
            pair.source,
            pair.target,
            f"{pair.js:.4f}",
            f"{pair.kl_target_source:.4f}",
            f"{pair.kl_source_target:.4f}",
            percent_points(pair.error),
        )
        for pair in sorted(outcome.pairs, key=lambda pair: pair.js)
    ]
    return Table(
        title="Divergence of source and target, and the error of transfer",
        header=("source", "target", "JS", "KL(target||source)", "KL(source||target)", "error, %"),
        rows=tuple(rows),
        note="Nats, between mean activations of the extractor; near/max labels, means over "
        f"{config.seeds} seeds.",
    )


def _pairs_chart(outcome: GeometricLabelsOutcome) -> Chart:
    series = []
    for color, target in enumerate(dict.fromkeys(pair.target for pair in outcome.pairs)):
        pairs = [pair for pair in outcome.pairs if pair.target == target]
        x, y = tuple(pair.js for pair in pairs), tuple(100 * pair.error for pair in pairs)
        series.append(Series(label=f"target {target}", x=x, y=y, style="points", color=color))
    return Chart(
        title="Error against divergence",
        x_label="Jensen-Shannon divergence, nats",
        y_label="target error, %",
        series=tuple(series),
    )


def _rates_chart(outcome: GeometricLabelsOutcome) -> Chart:
    rates, series = tuple(sorted(outcome.plan.job.rates)), []
    for color, arm in enumerate(outcome.plan.job.arms):
        means = [interval(_accuracies(outcome, arm, rate)).mean for rate in rates]
        y = tuple(100 * mean for mean in means)
        series.append(Series(label=arm, x=rates, y=y, color=color))
    return Chart(
        title="Accuracy over learning rates",
        x_label="learning rate of fine-tuning",
        y_label="accuracy, %",
        log_x=len(rates) > 1,
        series=tuple(series),
        note="Means over seeds. An arm whose best rate lies at the edge might gain from more.",
    )


def _facts(outcome: GeometricLabelsOutcome) -> Iterator[tuple[str, str]]:
    yield "Pool", f"{len(outcome.plan.pool):,} images"
    yield "Anchors", f"{outcome.num_anchors}"
    yield "Label length m", f"{outcome.plan.job.m}"
    yield "Pre-trainings", f"{len(outcome.bases)}"
    yield "Fine-tunings", f"{len(outcome.tuned)}"
