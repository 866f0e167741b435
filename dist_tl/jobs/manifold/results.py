"""results.json of a manifold run: claims, tables, learning curves, phase diagram."""

from collections.abc import Iterator

from dist_tl.jobs.manifold.claims import Claim, Curves, claims, difference
from dist_tl.jobs.manifold.run import ManifoldOutcome
from dist_tl.jobs.manifold.spec import Cell, SweepConfig
from dist_tl.report.results import Chart, HeatMap, Interval, Series, Study, Table, interval

NAMES = {
    "transferred": "transferred features",
    "random": "random features",
    "two_layer": "trained from scratch",
    "fine_tuned": "fine-tuned",
}
READOUT_ARMS = ("transferred", "random")


def results(outcome: ManifoldOutcome) -> Study:
    """Claims, errors and gains, for the terminal and the report."""
    curves, judged = Curves(outcome), claims(outcome)
    return Study(
        findings=tuple(_findings(outcome, curves)),
        verdict=_verdict(judged, curves),
        tables=(*_claims_table(judged), _errors_table(curves), *_sweep_tables(curves)),
        charts=(_learning_curves(curves), *_sweep_charts(curves)),
        heat_maps=tuple(_phase_diagram(curves)),
        facts=tuple(_facts(outcome)),
    )


def _verdict(judged: list[Claim], curves: Curves) -> str:
    base, num = curves.job.base(), curves.job.samples[0]
    gap = difference(
        curves.simulated("transferred", base, num), curves.simulated("random", base, num)
    )
    tried = [claim for claim in judged if claim.holds is not None]
    held = sum(bool(claim.holds) for claim in tried)
    counted = f"{held} of {len(tried)} claims that this run can judge hold" if tried else ""
    word = "below" if gap.mean < 0 else "above"
    sentence = (
        f"At n = {num} transferred features err {_points(abs(gap.mean))} points {word} random ones "
        f"{_bounds(gap)}"
    )
    return f"{sentence}; {counted}." if counted else f"{sentence}."


def _bounds(gap: Interval) -> str:
    if gap.half_width is None:
        return "(one instance, no interval)"
    return f"(± {_points(gap.half_width)}, {gap.count} instances)"


def _claims_table(judged: list[Claim]) -> Iterator[Table]:
    rows = [(claim.text, claim.outcome, claim.evidence) for claim in judged]
    if all(claim.holds is None for claim in judged):
        return  # this job asks something else
    yield Table(
        title="Claims",
        header=("claim", "outcome", "evidence"),
        rows=tuple(rows),
        note="Differences of test error with 95 % intervals over instances, where there are several"
        "; negative: transferred features are better.",
    )


def _errors_table(curves: Curves) -> Table:
    job, base = curves.job, curves.job.base()
    rows = []
    for arm in job.arms:
        for num in job.samples:
            simulated = interval(curves.simulated(arm, base, num))
            rows.append(
                (
                    NAMES[arm],
                    str(num),
                    _share(simulated),
                    _optional(curves.theory(arm, base, num) if arm in READOUT_ARMS else None),
                    _optional(curves.mixture(arm, base, num) if arm == "transferred" else None),
                )
            )
    return Table(
        title="Test error, simulated and computed",
        header=("features", "n", "simulated", "Gaussian theory", "mixture theory"),
        rows=tuple(rows),
        note=f"The tasks of `model`, {job.loss} loss, lambda {job.reported_lambda:g}; means over "
        f"{job.instances} instances of {job.draws} draws. The Gaussian theory over-estimates the "
        "error of trained features; the mixture theory covers matched tasks.",
    )


def _sweep_tables(curves: Curves) -> Iterator[Table]:
    job, rivals = curves.job, _rivals(curves)
    for sweep in job.sweeps:
        rows = [
            (f"{value:g}", str(num), *(_signed(_gap(curves, cell, num, r)) for r in rivals))
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


def _rivals(curves: Curves) -> list[str]:
    return [arm for arm in ("random", "two_layer") if arm in curves.job.arms]


def _gap(curves: Curves, cell: Cell, num: int, rival: str) -> Interval:
    return difference(
        curves.simulated("transferred", cell, num), curves.simulated(rival, cell, num)
    )


def _learning_curves(curves: Curves) -> Chart:
    job, base = curves.job, curves.job.base()
    series = []
    for color, arm in enumerate(job.arms):
        if arm in READOUT_ARMS:
            series += _line(curves, arm, base, color)
        series.append(_simulated_series(curves, arm, base, color))
    return Chart(
        title="Learning curves of the base tasks",
        x_label="labelled target samples n",
        y_label="test error, %",
        log_x=True,
        series=tuple(series),
        note="Lines are theory (the mixture theory where there is one), points are simulations "
        "with 95 % intervals over instances.",
    )


def _line(curves: Curves, arm: str, cell: Cell, color: int) -> list[Series]:
    found = {
        num: curves.mixture(arm, cell, num) or curves.theory(arm, cell, num)
        for num in curves.job.samples
    }
    known = {num: 100 * sum(v) / len(v) for num, v in found.items() if v is not None}
    if not known:
        return []
    label = f"{NAMES[arm]}, theory"
    return [Series(label=label, x=tuple(known), y=tuple(known.values()), color=color)]


def _simulated_series(curves: Curves, arm: str, cell: Cell, color: int) -> Series:
    intervals = [interval(curves.simulated(arm, cell, num)) for num in curves.job.samples]
    return Series(
        label=NAMES[arm],
        x=tuple(float(num) for num in curves.job.samples),
        y=tuple(100 * found.mean for found in intervals),
        half_width=tuple(100 * (found.half_width or 0.0) for found in intervals),
        style="points",
        color=color,
    )


def _sweep_charts(curves: Curves) -> Iterator[Chart]:
    for sweep in curves.job.sweeps:
        if len(sweep.values) < 2:
            continue
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
    pairs = sorted(zip(sweep.values, curves.job.swept(sweep), strict=True))
    for color, num in enumerate(curves.job.samples):
        theory = {value: gain for value, cell in pairs if (gain := _gain(curves, cell, num, True))}
        if theory:
            yield Series(
                label=f"n={num}, theory",
                x=tuple(theory),
                y=tuple(100 * gain.mean for gain in theory.values()),
                color=color,
            )
        simulated = [(value, _gain(curves, cell, num, False)) for value, cell in pairs]
        yield Series(
            label=f"n={num}",
            x=tuple(value for value, _ in simulated),
            y=tuple(100 * gain.mean for _, gain in simulated if gain),
            half_width=tuple(100 * (gain.half_width or 0.0) for _, gain in simulated if gain),
            style="points",
            color=color,
        )


def _gain(curves: Curves, cell: Cell, num: int, theory: bool) -> Interval | None:
    read = curves.best_theory if theory else curves.best_simulated
    ours, theirs = read("transferred", cell, num), read("random", cell, num)
    return None if ours is None or theirs is None else difference(theirs, ours)


def _phase_diagram(curves: Curves) -> Iterator[HeatMap]:
    job = curves.job
    if job.grid is None:
        return
    for num in job.samples:
        gains = [[_gain(curves, cell, num, False) for cell in row] for row in job.gridded()]
        yield HeatMap(
            title=f"Gain of transferred over random features at n = {num}, points of test error",
            x_label=job.grid.x.knob,
            y_label=job.grid.y.knob,
            x=tuple(f"{value:g}" for value in job.grid.x.values),
            y=tuple(f"{value:g}" for value in job.grid.y.values),
            values=tuple(tuple(100 * gain.mean for gain in row if gain) for row in gains),
            insignificant=tuple(
                tuple(gain.half_width is not None and not gain.excludes_zero for gain in row)
                for row in gains
                if all(row)
            ),
            note="Simulated, each arm at its own best lambda. Hatched: the 95 % interval over "
            "instances includes zero. The line is where the gain is zero.",
        )


def _findings(outcome: ManifoldOutcome, curves: Curves) -> Iterator[str]:
    for key in sorted({size for _, size in outcome.sources}):
        errors = [a.error for (_, size), a in outcome.sources.items() if size == key]
        found = interval(errors)
        yield f"Sources with {key} latent dimensions err {_share(found)} % on their own task."
    base = curves.job.base()
    for arm in READOUT_ARMS:
        yield from _theory_gap(curves, arm, base)
    failures = curves.failures()
    if failures:
        yield (
            f"{len(failures)} points have no theory: the solver did not converge, e.g. "
            f"{failures[0].failure}."
        )


def _theory_gap(curves: Curves, arm: str, cell: Cell) -> Iterator[str]:
    for name, read in (("Gaussian", curves.theory), ("mixture", curves.mixture)):
        gaps = []
        for num in curves.job.samples:
            theory = read(arm, cell, num)
            if theory is not None:
                simulated = curves.simulated(arm, cell, num)
                gaps += [a - b for a, b in zip(theory, simulated, strict=True)]
        if gaps:
            worst = max(gaps, key=abs)
            yield (
                f"{NAMES[arm].capitalize()}: the {name} theory minus the simulation is "
                f"{sum(gaps) / len(gaps):+.4f} on average, {worst:+.4f} at worst, over "
                f"{len(gaps)} points."
            )


def _facts(outcome: ManifoldOutcome) -> Iterator[tuple[str, str]]:
    job = outcome.plan.job
    yield "Sizes", f"D = {job.model.inputs}, K = {job.hidden}, n_s = {job.source_samples}"
    yield "Instances", f"{job.instances}, {job.draws} draws each"
    yield "Cells", f"{len(job.cells())}"
    for row in outcome.plan.table().tasks:
        yield f"Tasks: {row.phase}", f"{row.tasks}"


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def _share(found: Interval) -> str:
    mean = _points(found.mean)
    return mean if found.half_width is None else f"{mean} ± {_points(found.half_width)}"


def _optional(values: list[float] | None) -> str:
    return "" if values is None else f"{100 * sum(values) / len(values):.1f}"


def _signed(gap: Interval) -> str:
    mean = f"{100 * gap.mean:+.1f}"
    return mean if gap.half_width is None else f"{mean} ± {_points(gap.half_width)}"
