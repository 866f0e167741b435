"""results.json of a forecast: curves, checks, labels needed, crossings."""

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from dist_tl.jobs.forecast.run import ForecastOutcome
from dist_tl.jobs.forecast.tasks import CheckPoint, MapOutput
from dist_tl.methods.hidden_manifold.forecast import Forecast, crossing, samples_for_mse
from dist_tl.report.results import Chart, Series, Study, Table


def results(outcome: ForecastOutcome) -> Study:
    """Curves, checks and crossings, for the terminal and the report."""
    curves = {name: _curve(answer) for name, answer in outcome.maps.items()}
    tables = [_needed(outcome, curves), _checks(outcome)]
    if outcome.job.verify:
        tables.append(_verification(outcome))
    return Study(
        findings=tuple(_findings(outcome, curves)),
        verdict=_verdict(outcome, curves),
        tables=tuple(tables),
        charts=tuple(_charts(outcome)),
        facts=tuple(_facts(outcome)),
    )


def _curve(answer: MapOutput) -> Forecast:
    column = {name: np.array([getattr(p, name) for p in answer.curve]) for name in _COLUMNS}
    return Forecast(
        sizes_S=column["samples"],
        mse_S=column["mse"],
        lam_S=column["lam"],
        low_S=column["low"],
        high_S=column["high"],
    )


_COLUMNS = ("samples", "mse", "lam", "low", "high")


def _verdict(outcome: ForecastOutcome, curves: dict[str, Forecast]) -> str:
    first, last = outcome.job.sizes[0], outcome.job.sizes[-1]
    scarce = min(curves, key=lambda name: curves[name].mse_S[0])
    plenty = min(curves, key=lambda name: curves[name].mse_S[-1])
    doubted = [name for name, answer in outcome.maps.items() if not _reliable(answer)]
    sentence = (
        f"{plenty} is forecast to be best at every end, from {first} to {last} labels"
        if scarce == plenty
        else f"{scarce} is forecast to be best with {first} labels, {plenty} with {last}"
    )
    doubt = f"; unreliable by its own check: {', '.join(doubted)}" if doubted else ""
    return f"{sentence}{doubt}."


def _reliable(answer: MapOutput) -> bool:
    return all(check.agrees for check in answer.checks)


def _needed(outcome: ForecastOutcome, curves: dict[str, Forecast]) -> Table:
    rows = []
    for name, curve in curves.items():
        cells = [_count(samples_for_mse(curve, mse)) for mse in outcome.job.target_mse]
        verdict = "agrees" if _reliable(outcome.maps[name]) else "unreliable"
        rows.append((name, str(outcome.maps[name].num_features), *cells, verdict))
    header = ("map", "features", *(f"labels for MSE {m:g}" for m in outcome.job.target_mse))
    return Table(
        title="Labelled samples that each feature map needs",
        header=(*header, "check"),
        rows=tuple(rows),
        note=f"Forecast from {outcome.job.labelled} labels, on {outcome.job.components} principal "
        "components. MSE: of one-vs-rest labels -1 and +1, averaged over classes; the check is the "
        "next table.",
    )


def _count(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f}"


def _checks(outcome: ForecastOutcome) -> Table:
    rows = [
        row for name, answer in outcome.maps.items() for row in _rows(name, answer, answer.checks)
    ]
    return Table(
        title="Forecast against held-out labels",
        header=("map", "n", "forecast", "measured", "gap %", "accuracy %", "check"),
        rows=tuple(rows),
        note=f"Ridge on n of the {outcome.job.labelled} labels, tested on the others, "
        f"{outcome.job.draws} draws (± standard error). A gap above 10 % and 3 standard errors is "
        "marked. Second moments do not fix accuracy: it is measured.",
    )


def _verification(outcome: ForecastOutcome) -> Table:
    rows = [
        row
        for name, answer in outcome.maps.items()
        for row in _rows(name, answer, answer.verification)
    ]
    return Table(
        title="Forecast against all labels of the data",
        header=("map", "n", "forecast", "measured", "gap %", "accuracy %", "check"),
        rows=tuple(rows),
        note="What a user could not measure: ridge on n labels drawn from all, tested on the rest.",
    )


def _rows(
    name: str, answer: MapOutput, checks: tuple[CheckPoint, ...]
) -> Iterator[tuple[str, ...]]:
    forecast = {point.samples: point.mse for point in answer.curve}
    for check in checks:
        gap = forecast[check.samples] / check.mse - 1
        yield (
            name,
            str(check.samples),
            f"{forecast[check.samples]:.3f}",
            f"{check.mse:.3f} ± {check.error:.3f}",
            f"{100 * gap:+.1f}",
            f"{100 * check.accuracy:.1f}",
            "agrees" if check.agrees else "unreliable",
        )


def _charts(outcome: ForecastOutcome) -> Iterator[Chart]:
    series = []
    for color, (name, answer) in enumerate(outcome.maps.items()):
        points = answer.curve
        series.append(
            Series(
                label=f"{name}, forecast",
                x=tuple(float(p.samples) for p in points),
                y=tuple(p.mse for p in points),
                band=tuple((p.low, p.high) for p in points),
                color=color,
            )
        )
        series.append(_measured(name, answer.verification or answer.checks, color))
    yield Chart(
        title="Learning curves, forecast and measured",
        x_label="labelled target samples n",
        y_label="mean squared error",
        log_x=True,
        series=tuple(series),
        note="Lines: forecast, with its 95 % bootstrap band over labels. Points: measured on "
        "held-out labels, with two standard errors.",
    )


def _measured(name: str, checks: tuple[CheckPoint, ...], color: int) -> Series:
    return Series(
        label=f"{name}, measured",
        x=tuple(float(c.samples) for c in checks),
        y=tuple(c.mse for c in checks),
        half_width=tuple(2 * c.error for c in checks),
        style="points",
        color=color,
    )


def _findings(outcome: ForecastOutcome, curves: dict[str, Forecast]) -> Iterator[str]:
    for one, other in combinations(curves, 2):
        n = crossing(curves[one], curves[other])
        if n is not None:
            yield f"The curves of {one} and {other} cross at about {n:.0f} labels."
    for name, answer in outcome.maps.items():
        checked = answer.verification or answer.checks
        forecast = {point.samples: point.mse for point in answer.curve}
        gaps = [abs(forecast[c.samples] / c.mse - 1) for c in checked]
        yield (
            f"{name}: the forecast is off by {100 * float(np.mean(gaps)):.1f} % of the error on "
            f"average, {100 * max(gaps):.1f} % at worst, over {len(gaps)} measured sizes."
        )


def _facts(outcome: ForecastOutcome) -> Iterator[tuple[str, str]]:
    job = outcome.job
    yield "Labels seen", f"{job.labelled}"
    yield "Components", f"{job.components}"
    yield "Draws of a measured size", f"{job.draws}"
    yield "Bootstrap samples", f"{job.bootstrap}"
