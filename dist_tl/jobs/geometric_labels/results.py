"""results.json of a geometric labelling: arms with intervals, the labels, the forecast."""

from collections.abc import Iterator

from dist_tl.jobs.geometric_labels.run import GeometricLabelsOutcome
from dist_tl.jobs.geometric_labels.spec import BASELINE
from dist_tl.methods.geometry.divergence import RankForecast, rank_forecast
from dist_tl.report.results import (
    Chart,
    Interval,
    Series,
    Study,
    Table,
    interval,
)
from dist_tl.seeds import numpy_rng

RIVALS = ("nearest_m", "kmeans", "random_labels")


def results(outcome: GeometricLabelsOutcome) -> Study:
    """Arms, labels and the divergence forecast, for the terminal and the report."""
    forecast = _forecast(outcome)
    tables = [_arms_table(outcome), _labels_table(outcome)]
    charts = [_rates_chart(outcome)]
    if forecast is not None:
        tables.append(_pairs_table(outcome))
        charts.append(_pairs_chart(outcome))
    return Study(
        findings=tuple(_findings(outcome, forecast)),
        verdict=_verdict(outcome),
        tables=tuple(tables),
        charts=tuple(charts),
        facts=tuple(_facts(outcome)),
    )


def _accuracies(outcome: GeometricLabelsOutcome, arm: str, rate: float) -> list[float]:
    repeats = range(outcome.plan.job.seeds)
    return [outcome.tuned[arm, rate, repeat].accuracy for repeat in repeats]


def _best_rate(outcome: GeometricLabelsOutcome, arm: str) -> float:
    """Of the rates, the best by its mean over repeats: the same favour for every arm."""
    return max(
        outcome.plan.job.rates, key=lambda rate: interval(_accuracies(outcome, arm, rate)).mean
    )


def _best(outcome: GeometricLabelsOutcome, arm: str) -> list[float]:
    return _accuracies(outcome, arm, _best_rate(outcome, arm))


def _difference(outcome: GeometricLabelsOutcome, one: str, other: str) -> Interval:
    pairs = zip(_best(outcome, one), _best(outcome, other), strict=True)
    return interval([a - b for a, b in pairs])


def _arms_table(outcome: GeometricLabelsOutcome) -> Table:
    job, rows = outcome.plan.job, []
    for arm in job.arms:
        labelling = outcome.labellings.get(arm)
        base = outcome.bases.get(arm)
        gain = None if arm == BASELINE else _difference(outcome, arm, BASELINE)
        rows.append(
            (
                arm,
                _share(interval(_best(outcome, arm))),
                "baseline" if gain is None else _signed(gain),
                f"{_best_rate(outcome, arm):g}",
                "" if labelling is None else str(labelling.num_classes),
                "" if base is None else f"{base.final_loss:.2f}",
            )
        )
    return Table(
        title="Accuracy on the target's test split, %",
        header=("arm", "accuracy", f"gain over {BASELINE}", "rate", "classes", "pre-training loss"),
        rows=tuple(rows),
        note=f"{job.seeds} seeds, 95 % intervals, gains paired by seed. Every arm at the "
        f"best of {len(job.rates)} learning rates by its mean, so all are a little too "
        "high, alike.",
    )


def _labels_table(outcome: GeometricLabelsOutcome) -> Table:
    rows = []
    for way, table in outcome.tables.items():
        counted = outcome.counted[way]
        rows.append(
            (
                way,
                str(len(counted.labels)),
                str(len(table.names)),
                f"{table.entropy:.2f}",
                f"{100 * table.largest_share:.0f}",
                str(table.merged),
                str(table.dropped),
                str(counted.degenerate),
            )
        )
    header = (
        "labels",
        "distinct",
        "classes",
        "entropy, nats",
        "largest, %",
        "pooled",
        "dropped",
        "degenerate",
    )
    return Table(
        title="What the labels look like",
        header=header,
        rows=tuple(rows),
        note=f"m = {outcome.plan.job.m} of {outcome.num_anchors} anchors; classes of fewer than "
        f"{outcome.plan.job.rare.min_count} items: {outcome.plan.job.rare.rare}.",
    )


def _verdict(outcome: GeometricLabelsOutcome) -> str:
    arms = outcome.plan.job.g2l_arms
    if not arms:
        return "No arm labels by geometry."
    best = max(arms, key=lambda arm: interval(_best(outcome, arm)).mean)
    parts = [
        f"{_against(outcome, best, rival)} {rival}"
        for rival in ("nearest_m", "kmeans")
        if rival in outcome.plan.job.arms
    ]
    gain = _difference(outcome, best, BASELINE)
    beat = "beats" if gain.excludes_zero and gain.mean > 0 else "does not clearly beat"
    sentence = f"G2L ({best}) {beat} {BASELINE} ({_signed(gain)} points)"
    return f"{sentence}; geometry {' and '.join(parts)}." if parts else f"{sentence}."


def _against(outcome: GeometricLabelsOutcome, one: str, other: str) -> str:
    gap = _difference(outcome, one, other)
    if not gap.excludes_zero:
        return f"cannot be told ({_signed(gap)}) from"
    return f"is {'better' if gap.mean > 0 else 'worse'} ({_signed(gap)}) than"


def _findings(outcome: GeometricLabelsOutcome, forecast: RankForecast | None) -> Iterator[str]:
    arms = outcome.plan.job.arms
    for g2l in outcome.plan.job.g2l_arms:
        for rival in (*RIVALS, "human_labels"):
            if rival in arms:
                yield f"{g2l} {_against(outcome, g2l, rival)} {rival}."
    if forecast is not None:
        text = (
            f"Over {forecast.pairs} (source, target) pairs the rank correlation of divergence and "
            f"error is {forecast.rho:+.2f}"
        )
        if forecast.low is not None:
            text += f" (95 % bootstrap interval {forecast.low:+.2f} to {forecast.high:+.2f})"
            unclear = forecast.low <= 0 <= forecast.high
            text += "; nothing that could be told from noise" if unclear else ""
        else:
            text += "; too few pairs for an interval"
        yield text + "."
        yield (
            "A linear fit to the pairs of all other targets is off by "
            f"{100 * forecast.left_out_error:.1f} points of error on average."
        )


def _forecast(outcome: GeometricLabelsOutcome) -> RankForecast | None:
    pairs = outcome.pairs
    if len(pairs) < 3:
        return None
    return rank_forecast(
        [pair.js for pair in pairs],
        [pair.error for pair in pairs],
        [pair.target for pair in pairs],
        rng=numpy_rng(outcome.plan.job.seed, "divergence bootstrap"),
    )


def _pairs_table(outcome: GeometricLabelsOutcome) -> Table:
    rows = [
        (
            pair.source,
            pair.target,
            f"{pair.js:.4f}",
            f"{pair.kl_target_source:.4f}",
            f"{pair.kl_source_target:.4f}",
            f"{100 * pair.error:.1f}",
        )
        for pair in sorted(outcome.pairs, key=lambda pair: pair.js)
    ]
    header = ("source", "target", "JS", "KL(target||source)", "KL(source||target)", "error, %")
    return Table(
        title="Divergence of source and target, and the error of transfer",
        header=header,
        rows=tuple(rows),
        note="Nats, between mean activations of the extractor; near/max labels, means over "
        f"{outcome.plan.job.pairs.seeds if outcome.plan.job.pairs else 0} seeds.",
    )


def _pairs_chart(outcome: GeometricLabelsOutcome) -> Chart:
    targets = list(dict.fromkeys(pair.target for pair in outcome.pairs))
    return Chart(
        title="Error against divergence",
        x_label="Jensen-Shannon divergence, nats",
        y_label="target error, %",
        series=tuple(
            Series(
                label=f"target {target}",
                x=tuple(pair.js for pair in outcome.pairs if pair.target == target),
                y=tuple(100 * pair.error for pair in outcome.pairs if pair.target == target),
                style="points",
                color=color,
            )
            for color, target in enumerate(targets)
        ),
    )


def _rates_chart(outcome: GeometricLabelsOutcome) -> Chart:
    rates = tuple(sorted(outcome.plan.job.rates))
    series = []
    for color, arm in enumerate(outcome.plan.job.arms):
        means = [interval(_accuracies(outcome, arm, rate)).mean for rate in rates]
        series.append(
            Series(label=arm, x=rates, y=tuple(100 * mean for mean in means), color=color)
        )
    return Chart(
        title="Accuracy over learning rates",
        x_label="learning rate of fine-tuning",
        y_label="accuracy, %",
        log_x=len(rates) > 1,
        series=tuple(series),
        note="Means over seeds. An arm whose best rate lies at the edge might gain from more.",
    )


def _facts(outcome: GeometricLabelsOutcome) -> Iterator[tuple[str, str]]:
    yield "Pool", f"{outcome.plan.pool_size:,} images"
    yield "Anchors", f"{outcome.num_anchors}"
    yield "Label length m", f"{outcome.plan.job.m}"
    yield "Pre-trainings", f"{len(outcome.bases)}"
    yield "Fine-tunings", f"{len(outcome.tuned)}"


def _share(found: Interval) -> str:
    mean = f"{100 * found.mean:.1f}"
    return mean if found.half_width is None else f"{mean} ± {100 * found.half_width:.1f}"


def _signed(gain: Interval) -> str:
    mean = f"{100 * gain.mean:+.1f}"
    return mean if gain.half_width is None else f"{mean} ± {100 * gain.half_width:.1f}"
