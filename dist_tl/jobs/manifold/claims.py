"""What the acceptance claims of the hidden manifold model come to in one run.

Every claim is judged from the run's own numbers, over instances, and says "holds", "does not hold"
or "cannot be said" where the job has not measured what it needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dist_tl.jobs.manifold.run import ManifoldOutcome
from dist_tl.jobs.manifold.spec import Cell, Knob
from dist_tl.jobs.manifold.tasks import Point
from dist_tl.report.results import Interval, interval

FADING = ("teacher_corr", "feature_corr", "substituted")


@dataclass(frozen=True)
class Claim:
    """One sentence about the model, and what became of it."""

    text: str
    holds: bool | None
    evidence: str

    @property
    def outcome(self) -> str:
        """As a word for a table."""
        return {True: "holds", False: "does not hold", None: "cannot be said"}[self.holds]


class Curves:
    """Errors by arm, cell and training set size: one number an instance."""

    def __init__(self, outcome: ManifoldOutcome) -> None:
        self.job = outcome.plan.job
        self._outcome = outcome

    def simulated(self, arm: str, cell: Cell, num: int) -> list[float]:
        """Mean test errors at the reported penalty."""
        return [point.mean for point in self._reported(arm, cell, num)]

    def theory(self, arm: str, cell: Cell, num: int) -> list[float] | None:
        """The Gaussian theory at the reported penalty; None where one did not converge."""
        return _complete([point.theory for point in self._reported(arm, cell, num)])

    def mixture(self, arm: str, cell: Cell, num: int) -> list[float] | None:
        """The mixture theory at the reported penalty, where there is one."""
        return _complete([point.mixture for point in self._reported(arm, cell, num)])

    def best_theory(self, arm: str, cell: Cell, num: int) -> list[float] | None:
        """The theory at its own best penalty."""
        values = []
        for points in self._all(arm, cell, num):
            known = [point.theory for point in points if point.theory is not None]
            if len(known) < len(points):
                return None
            values.append(min(known))
        return values

    def best_simulated(self, arm: str, cell: Cell, num: int) -> list[float]:
        """The simulation at the penalty that is best by its mean over instances."""
        table = [[point.mean for point in points] for points in self._all(arm, cell, num)]
        means = [sum(column) / len(table) for column in zip(*table, strict=True)]
        best = means.index(min(means))
        return [row[best] for row in table]

    def failures(self) -> list[Point]:
        """Points without a theory."""
        answers = [*self._outcome.cells.values(), *self._outcome.baselines.values()]
        return [point for answer in answers for point in answer.points if point.failure]

    def _reported(self, arm: str, cell: Cell, num: int) -> list[Point]:
        lam = self.job.reported_lambda
        return [
            next(point for point in points if point.lam in (None, lam))
            for points in self._all(arm, cell, num)
        ]

    def _all(self, arm: str, cell: Cell, num: int) -> list[list[Point]]:
        """The points of each instance, by penalty."""
        return [
            [p for p in self._answer(arm, cell, i) if (p.arm, p.samples) == (arm, num)]
            for i in range(self.job.instances)
        ]

    def _answer(self, arm: str, cell: Cell, instance: int) -> Sequence[Point]:
        if arm in ("transferred", "fine_tuned"):
            return self._outcome.cells[instance, cell.name].points
        return self._outcome.baselines[instance, cell.model.target_latent].points


def _complete(values: list[float | None]) -> list[float] | None:
    return None if None in values else [value for value in values if value is not None]


def difference(one: Sequence[float], other: Sequence[float]) -> Interval:
    """The paired difference over instances with its interval."""
    return interval([a - b for a, b in zip(one, other, strict=True)])


def claims(outcome: ManifoldOutcome) -> list[Claim]:
    """All claims, in the order of the notes (section 5, numbers 1, 2, 3 and 6)."""
    curves = Curves(outcome)
    return [
        _scarce(curves),
        _overtaken(curves),
        *[_fades(curves, knob) for knob in FADING],
        _complex_to_simple(curves),
    ]


def _scarce(curves: Curves) -> Claim:
    job, base = curves.job, curves.job.base()
    text = "1. Related tasks, scarce data: transferred features beat random ones and training anew"
    sizes = [num for num in job.samples if num <= 4 * job.hidden]
    rivals = [arm for arm in ("random", "two_layer") if arm in job.arms]
    if not sizes or len(rivals) < 2:
        return Claim(text, None, "needs arm two_layer and a training set of 4K samples or fewer")
    gaps = {
        (num, arm): difference(
            curves.simulated("transferred", base, num), curves.simulated(arm, base, num)
        )
        for num in sizes
        for arm in rivals
    }
    evidence = "; ".join(f"n={n}: {_signed(gap)} to {arm}" for (n, arm), gap in gaps.items())
    return Claim(text, all(_below_zero(gap) for gap in gaps.values()), evidence)


def _below_zero(gap: Interval) -> bool:
    return gap.mean < 0 and (gap.half_width is None or gap.excludes_zero)


def _overtaken(curves: Curves) -> Claim:
    text = "2. Training anew overtakes as n grows, sooner for weaker teacher correlation"
    swept = _sweep(curves, "teacher_corr")
    if len(swept) < 2 or "two_layer" not in curves.job.arms:
        return Claim(text, None, "needs arm two_layer and a sweep over teacher_corr")
    crossings = {value: _crossing(curves, cell) for value, cell in swept}
    order = [crossings[value] for value in sorted(crossings, reverse=True)]
    sooner = all(after <= before for before, after in pairwise(order))
    words = [
        f"c_T={v:g}: {'never' if n == float('inf') else f'n={n:g}'}" for v, n in crossings.items()
    ]
    return Claim(text, sooner and order[-1] < order[0], "overtaken at " + ", ".join(words))


def _crossing(curves: Curves, cell: Cell) -> float:
    """The first training set size at which training anew is better; infinite if there is none."""
    for num in sorted(curves.job.samples):
        gap = difference(
            curves.simulated("transferred", cell, num), curves.simulated("two_layer", cell, num)
        )
        if gap.mean > 0:
            return num
    return float("inf")


def _fades(curves: Curves, knob: Knob) -> Claim:
    text = f"3. The gain over random features fades with {knob} (theory, each at its best penalty)"
    swept = _sweep(curves, knob)
    num = _nearest(curves.job.samples, curves.job.hidden)
    if len(swept) < 3:
        return Claim(text, None, f"needs a sweep over {knob} of three values or more")
    gains = []
    for _, cell in sorted(swept, key=lambda pair: pair[0], reverse=knob != "substituted"):
        ours = curves.best_theory("transferred", cell, num)
        theirs = curves.best_theory("random", cell, num)
        if ours is None or theirs is None:
            return Claim(text, None, "the theory did not converge in every cell")
        gains.append([b - a for a, b in zip(ours, theirs, strict=True)])
    steps = [difference(after, before) for before, after in pairwise(gains)]
    fading = not any(step.mean > 0 and _is_clear(step) for step in steps)
    whole = difference(gains[-1], gains[0])
    evidence = f"gain at n={num}: " + ", ".join(f"{_mean(gain):+.3f}" for gain in gains)
    return Claim(text, fading and _below_zero(whole), evidence)


def _is_clear(gap: Interval) -> bool:
    return gap.half_width is None or gap.excludes_zero


def _complex_to_simple(curves: Curves) -> Claim:
    text = "6. From complex to simple is better than from simple to complex"
    target = curves.job.model.target_latent
    cells = dict(_sweep(curves, "source_latent"))
    richer = [value for value in cells if value > target]
    poorer = [value for value in cells if value < target]
    if not richer or not poorer:
        return Claim(text, None, "needs a sweep over source_latent below and above target_latent")
    high, low = min(richer), max(poorer)
    gaps = {
        num: difference(
            curves.simulated("transferred", cells[high], num),
            curves.simulated("transferred", cells[low], num),
        )
        for num in curves.job.samples
    }
    evidence = f"d_s={high:g} against {low:g}, d_t={target}: " + ", ".join(
        f"n={num}: {_signed(gap)}" for num, gap in gaps.items()
    )
    return Claim(text, all(_below_zero(gap) for gap in gaps.values()), evidence)


def _sweep(curves: Curves, knob: Knob) -> list[tuple[float, Cell]]:
    """The cells in which nothing but `knob` differs from the base, the base among them."""
    cells = {cell.value(knob): cell for cell in _swept(curves, knob)}
    base = curves.job.base()
    if cells:
        cells.setdefault(base.value(knob), base)
    return sorted(cells.items(), reverse=True)


def _swept(curves: Curves, knob: Knob) -> list[Cell]:
    job = curves.job
    return [cell for sweep in job.sweeps if sweep.knob == knob for cell in job.swept(sweep)]


def _nearest(samples: Sequence[int], wanted: int) -> int:
    return min(samples, key=lambda num: abs(num - wanted))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _signed(gap: Interval) -> str:
    return f"{gap.mean:+.3f}" + ("" if gap.half_width is None else f" ± {gap.half_width:.3f}")
