"""Summarises a forecast: learning curves, checks, labels needed, crossings."""

from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np

from dist_tl.jobs.forecast.run import ForecastOutcome
from dist_tl.jobs.forecast.tasks import MapOutput
from dist_tl.methods.hidden_manifold.forecast import Forecast, crossing, samples_for_mse
from dist_tl.methods.hidden_manifold.forecast_checks import Check, curve_of
from dist_tl.report.results import Chart, Series, Study, Table


def results(outcome: ForecastOutcome) -> Study:
    """Returns curves, checks and crossings, for the terminal and the report."""
    job = outcome.job
    curves = {name: curve_of(output.curve) for name, output in outcome.maps.items()}
    return Study(
        findings=tuple(_findings(outcome, curves)),
        verdict=_verdict(outcome, curves),
        tables=(_labels_needed(outcome, curves), *_check_tables(outcome)),
        charts=(_chart(outcome),),
        facts=(
            ("Labels seen", f"{job.labelled}"),
            ("Components", f"{job.components}"),
            ("Draws of a measured size", f"{job.draws}"),
            ("Bootstrap samples", f"{job.bootstrap}"),
        ),
    )


def _verdict(outcome: ForecastOutcome, curves: dict[str, Forecast]) -> str:
    first, last = outcome.job.sizes[0], outcome.job.sizes[-1]
    scarce = min(curves, key=lambda name: curves[name].mse_S[0])
    plenty = min(curves, key=lambda name: curves[name].mse_S[-1])
    unreliable = [name for name, output in outcome.maps.items() if not _is_reliable(output)]
    sentence = (
        f"{plenty} is forecast to be best at every end, from {first} to {last} labels"
        if scarce == plenty
        else f"{scarce} is forecast to be best with {first} labels, {plenty} with {last}"
    )
    doubt = f"; unreliable by its own check: {', '.join(unreliable)}" if unreliable else ""
    return f"{sentence}{doubt}."


def _is_reliable(output: MapOutput) -> bool:
    return all(check.agrees for check in output.checks)


def _labels_needed(outcome: ForecastOutcome, curves: dict[str, Forecast]) -> Table:
    job, rows = outcome.job, []
    for name, output in outcome.maps.items():
        needed = [samples_for_mse(curves[name], mse) for mse in job.target_mse]
        cells = ["never" if count is None else f"{count:.0f}" for count in needed]
        check = "agrees" if _is_reliable(output) else "unreliable"
        rows.append((name, str(output.num_features), *cells, check))
    return Table(
        title="Labelled samples that each feature map needs",
        header=("map", "features", *(f"labels for MSE {m:g}" for m in job.target_mse), "check"),
        rows=tuple(rows),
        note=f"Forecast from {job.labelled} labels, on {job.components} principal "
        "components. MSE: of one-vs-rest labels -1 and +1, averaged over classes; the check is the "
        "next table.",
    )


def _check_tables(outcome: ForecastOutcome) -> Iterator[Table]:
    job, outputs = outcome.job, outcome.maps.items()
    yield _check_table(
        "Forecast against held-out labels",
        f"Ridge on n of the {job.labelled} labels, tested on the others, "
        f"{job.draws} draws (± standard error). A gap above 10 % and 3 standard errors is "
        "marked. Second moments do not fix accuracy: it is measured.",
        {name: output.checks for name, output in outputs},
    )
    if job.verify:
        yield _check_table(
            "Forecast against all labels of the data",
            "A user cannot measure this: ridge on n labels drawn from all, tested on the rest.",
            {name: output.verification for name, output in outputs},
        )


def _check_table(title: str, note: str, checks: Mapping[str, tuple[Check, ...]]) -> Table:
    rows = [
        (
            name,
            str(check.samples),
            f"{check.forecast:.3f}",
            f"{check.mse:.3f} ± {check.error:.3f}",
            f"{100 * check.gap:+.1f}",
            f"{100 * check.accuracy:.1f}",
            "agrees" if check.agrees else "unreliable",
        )
        for name, of_map in checks.items()
        for check in of_map
    ]
    header = ("map", "n", "forecast", "measured", "gap %", "accuracy %", "check")
    return Table(title=title, header=header, rows=tuple(rows), note=note)


def _chart(outcome: ForecastOutcome) -> Chart:
    series = []
    for color, (name, output) in enumerate(outcome.maps.items()):
        points, checks = output.curve, output.verification or output.checks
        forecast = Series(
            label=f"{name}, forecast",
            x=tuple(point.samples for point in points),
            y=tuple(point.mse for point in points),
            band=tuple((point.low, point.high) for point in points),
            color=color,
        )
        measured = Series(
            label=f"{name}, measured",
            x=tuple(check.samples for check in checks),
            y=tuple(check.mse for check in checks),
            half_width=tuple(2 * check.error for check in checks),
            style="points",
            color=color,
        )
        series += [forecast, measured]
    return Chart(
        title="Learning curves, forecast and measured",
        x_label="labelled target samples n",
        y_label="mean squared error",
        log_x=True,
        series=tuple(series),
        note="Lines: forecast, with its 95 % bootstrap band over labels. Points: measured on "
        "held-out labels, with two standard errors.",
    )


def _findings(outcome: ForecastOutcome, curves: dict[str, Forecast]) -> Iterator[str]:
    for one, other in combinations(curves, 2):
        if (n := crossing(curves[one], curves[other])) is not None:
            yield f"The curves of {one} and {other} cross at about {n:.0f} labels."
    for name, output in outcome.maps.items():
        gaps = [abs(check.gap) for check in output.verification or output.checks]
        yield (
            f"{name}: the forecast is off by {100 * float(np.mean(gaps)):.1f} % of the error on "
            f"average, {100 * max(gaps):.1f} % at worst, over {len(gaps)} measured sizes."
        )
