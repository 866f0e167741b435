"""Summarises a manifold run: claims, tables, learning curves, phase diagram."""

from collections.abc import Iterator, Sequence

from dist_tl.jobs.comparisons import percent, percent_points, signed_percent
from dist_tl.jobs.manifold.claims import Claim, claims, claims_table
from dist_tl.jobs.manifold.curves import Curves, mean
from dist_tl.jobs.manifold.plan import source_name
from dist_tl.jobs.manifold.run import ManifoldOutcome
from dist_tl.jobs.manifold.spec import SweepConfig
from dist_tl.report.results import Chart, HeatMap, Series, Study, Table, error_bars, interval

NAMES = {
    "transferred": "transferred features",
    "random": "random features",
    "two_layer": "trained from scratch",
    "fine_tuned": "fine-tuned",
}
READOUT_ARMS = ("transferred", "random")


def results(outcome: ManifoldOutcome) -> Study:
    """Returns claims, errors and gains, for the terminal and the report."""
    curves = Curves(outcome)
    judged = claims(curves)
    return Study(
        findings=tuple(_findings(outcome, curves)),
        verdict=_verdict(judged, curves),
        tables=(*claims_table(judged), _errors_table(curves), *_sweep_tables(curves)),
        charts=(_learning_curves(curves), *_sweep_charts(curves)),
        heat_maps=tuple(_phase_diagram(curves)),
        facts=tuple(_facts(outcome)),
    )


def _verdict(judged: Sequence[Claim], curves: Curves) -> str:
    num = curves.job.samples[0]
    gap = curves.gap(curves.job.base(), num, "random")
    bounds = "one instance, no interval"
    if gap.half_width is not None:
        bounds = f"± {percent_points(gap.half_width)}, {gap.count} instances"
    sentence = (
        f"At n = {num} transferred features err {percent_points(abs(gap.mean))} points "
        f"{'below' if gap.mean < 0 else 'above'} random ones ({bounds})"
    )
    outcomes = [claim.holds for claim in judged if claim.holds is not None]
    counted = f"; {sum(outcomes)} of {len(outcomes)} claims that this run can judge hold"
    return f"{sentence}{counted if outcomes else ''}."


def _errors_table(curves: Curves) -> Table:
    job, base = curves.job, curves.job.base()
    rows = [
        (
            NAMES[arm],
            str(num),
            percent(interval(curves.simulated(arm, base, num))),
            _mean_percent(curves.theory(arm, base, num)),
            _mean_percent(curves.mixture(arm, base, num)),
        )
        for arm in job.arms
        for num in job.samples
    ]
    return Table(
        title="Test error, simulated and computed",
        header=("features", "n", "simulated", "Gaussian theory", "mixture theory"),
        rows=tuple(rows),
        note=f"The tasks of `model`, {job.loss} loss, lambda {job.reported_lambda:g}; means over "
        f"{job.instances} instances of {job.draws} draws. The Gaussian theory over-estimates the "
        "error of trained features; the mixture theory covers matched tasks.",
    )


def _mean_percent(values: Sequence[float] | None) -> str:
    return "" if values is None else percent_points(mean(values))


def _sweep_tables(curves: Curves) -> Iterator[Table]:
    job = curves.job
    rivals = [arm for arm in ("random", "two_layer") if arm in job.arms]
    for sweep in job.sweeps:
        rows = [
            (f"{value:g}", str(num), *(signed_percent(curves.gap(cell, num, r)) for r in rivals))
            for value, cell in zip(sweep.values, job.swept(sweep), strict=True)
            for num in job.samples
        ]
        yield Table(
            title=f"Transferred features against the others over {sweep.knob}",
            header=(sweep.knob, "n", *(f"to {NAMES[rival]}" for rival in rivals)),
            rows=tuple(rows),
            note=f"Differences of simulated test error, in points, at lambda "
            f"{job.reported_lambda:g}; negative: transferred features are better.",
        )


def _learning_curves(curves: Curves) -> Chart:
    job, base = curves.job, curves.job.base()
    series: list[Series] = []
    for color, arm in enumerate(job.arms):
        simulated = [interval(curves.simulated(arm, base, num)) for num in job.samples]
        series += [
            *_theory_line(curves, arm, color),
            error_bars(NAMES[arm], job.samples, simulated, color=color),
        ]
    return Chart(
        title="Learning curves of the base tasks",
        x_label="labelled target samples n",
        y_label="test error, %",
        log_x=True,
        series=tuple(series),
        note="Lines are theory (the mixture theory if there is one), points are simulations "
        "with 95 % intervals over instances.",
    )


def _theory_line(curves: Curves, arm: str, color: int) -> Iterator[Series]:
    base, percents = curves.job.base(), {}
    for num in curves.job.samples:
        if errors := curves.mixture(arm, base, num) or curves.theory(arm, base, num):
            percents[num] = 100 * sum(errors) / len(errors)
    if percents:
        label, x, y = f"{NAMES[arm]}, theory", tuple(percents), tuple(percents.values())
        yield Series(label=label, x=x, y=y, color=color)


def _sweep_charts(curves: Curves) -> Iterator[Chart]:
    for sweep in [sweep for sweep in curves.job.sweeps if len(sweep.values) > 1]:
        yield Chart(
            title=f"Gain over random features as {sweep.knob} changes",
            x_label=sweep.knob,
            y_label="random minus transferred test error, points",
            zero_line=True,
            series=tuple(_gain_series(curves, sweep)),
            note="Each arm at its own best lambda. Lines are the Gaussian theory, points are "
            "simulations; above zero transfer helps.",
        )


def _gain_series(curves: Curves, sweep: SweepConfig) -> Iterator[Series]:
    values = sorted(sweep.values)
    cells = [curves.job.base().with_knobs(**{sweep.knob: value}) for value in values]
    for color, num in enumerate(curves.job.samples):
        theory = {}
        for value, cell in zip(values, cells, strict=True):
            if gain := curves.theory_gain(cell, num):
                theory[value] = 100 * interval(gain).mean
        if theory:
            label, x, y = f"n={num}, theory", tuple(theory), tuple(theory.values())
            yield Series(label=label, x=x, y=y, color=color)
        simulated = [interval(curves.simulated_gain(cell, num)) for cell in cells]
        yield error_bars(f"n={num}", values, simulated, color=color)


def _phase_diagram(curves: Curves) -> Iterator[HeatMap]:
    job = curves.job
    if job.grid is None:
        return
    for num in job.samples:
        gains = [
            [interval(curves.simulated_gain(cell, num)) for cell in row] for row in job.gridded()
        ]
        yield HeatMap(
            title=f"Gain of transferred over random features at n = {num}, points of test error",
            x_label=job.grid.x.knob,
            y_label=job.grid.y.knob,
            x=tuple(f"{value:g}" for value in job.grid.x.values),
            y=tuple(f"{value:g}" for value in job.grid.y.values),
            values=tuple(tuple(100 * gain.mean for gain in row) for row in gains),
            insignificant=tuple(
                tuple(gain.half_width is not None and not gain.excludes_zero for gain in row)
                for row in gains
            ),
            note="Simulated, each arm at its own best lambda. Hatched: the 95 % interval over "
            "instances includes zero. The line is where the gain is zero.",
        )


def _findings(outcome: ManifoldOutcome, curves: Curves) -> Iterator[str]:
    job = outcome.plan.job
    for cell in job.source_cells():
        size, instances = cell.model.source_latent, range(job.instances)
        error = percent(interval([outcome.sources[source_name(i, cell)] for i in instances]))
        yield f"Sources with {size} latent dimensions err {error} % on their own task."
    for arm in READOUT_ARMS:
        yield from _theory_gaps(curves, arm)
    if failures := curves.failures():
        count, reason = len(failures), failures[0].failure
        yield f"{count} measurements have no theory: the solver did not converge, e.g. {reason}."


def _theory_gaps(curves: Curves, arm: str) -> Iterator[str]:
    base = curves.job.base()
    for name, theory in (("Gaussian", curves.theory), ("mixture", curves.mixture)):
        gaps: list[float] = []
        for num in curves.job.samples:
            if errors := theory(arm, base, num):
                simulated = curves.simulated(arm, base, num)
                gaps += [a - b for a, b in zip(errors, simulated, strict=True)]
        if gaps:
            yield (
                f"{NAMES[arm].capitalize()}: the {name} theory minus the simulation is "
                f"{mean(gaps):+.4f} on average, {max(gaps, key=abs):+.4f} at worst, over "
                f"{len(gaps)} measurements."
            )


def _facts(outcome: ManifoldOutcome) -> Iterator[tuple[str, str]]:
    job = outcome.plan.job
    yield "Sizes", f"D = {job.model.inputs}, K = {job.hidden}, n_s = {job.source_samples}"
    yield "Instances", f"{job.instances}, {job.draws} draws each"
    yield "Cells", f"{len(job.cells())}"
    for row in outcome.plan.table().tasks:
        yield f"Tasks: {row.phase}", f"{row.tasks}"
