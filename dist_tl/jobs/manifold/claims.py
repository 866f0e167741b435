"""Judges the acceptance claims of the hidden manifold model from the numbers of one run.

Claims are judged over instances; the outcome is "holds", "does not hold", or "cannot be said" if
the job lacks the measurements.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dist_tl.jobs.manifold.curves import Curves, difference, mean
from dist_tl.methods.hidden_manifold.cells import Cell, Knob
from dist_tl.report.results import Interval, Table

FADING: tuple[Knob, ...] = ("teacher_corr", "feature_corr", "substituted")


@dataclass(frozen=True)
class Claim:
    """One sentence about the model and whether it holds; None if the run cannot judge it."""

    text: str
    holds: bool | None
    evidence: str


def claims(curves: Curves) -> list[Claim]:
    """Judges all claims, in the order of the notes (section 5, numbers 1, 2, 3 and 6)."""
    return [
        _transfer_wins_when_scarce(curves),
        _training_anew_overtakes(curves),
        *[_gain_fades(curves, knob) for knob in FADING],
        _complex_to_simple(curves),
    ]


def claims_table(judged: Sequence[Claim]) -> Iterator[Table]:
    """Yields the table of claims, unless the run can judge none of them."""
    if all(claim.holds is None for claim in judged):
        return
    outcomes = {True: "holds", False: "does not hold", None: "cannot be said"}
    yield Table(
        title="Claims",
        header=("claim", "outcome", "evidence"),
        rows=tuple((claim.text, outcomes[claim.holds], claim.evidence) for claim in judged),
        note="Differences of test error with 95 % intervals over instances, if there are several; "
        "negative: transferred features are better.",
    )


def _transfer_wins_when_scarce(curves: Curves) -> Claim:
    job, base = curves.job, curves.job.base()
    text = "1. Related tasks, scarce data: transferred features beat random ones and training anew"
    sizes = [num for num in job.samples if num <= 4 * job.hidden]
    if not sizes or "two_layer" not in job.arms:
        return Claim(text, None, "needs arm two_layer and a training set of 4K samples or fewer")
    arms = ("random", "two_layer")
    gaps = {(num, arm): curves.gap(base, num, arm) for num in sizes for arm in arms}
    evidence = "; ".join(f"n={n}: {_signed(gap)} to {arm}" for (n, arm), gap in gaps.items())
    return Claim(text, all(map(_is_below_zero, gaps.values())), evidence)


def _training_anew_overtakes(curves: Curves) -> Claim:
    text = "2. Training anew overtakes as n grows, sooner for weaker teacher correlation"
    cells = _sweep(curves, "teacher_corr")
    if len(cells) < 2 or "two_layer" not in curves.job.arms:
        return Claim(text, None, "needs arm two_layer and a sweep over teacher_corr")
    crossings = {value: _crossing(curves, cell) for value, cell in cells.items()}
    order = list(crossings.values())  # from the strongest correlation down
    sooner = all(after <= before for before, after in pairwise(order))
    evidence = ", ".join(
        f"c_T={value:g}: {'never' if num == float('inf') else f'n={num:g}'}"
        for value, num in crossings.items()
    )
    return Claim(text, sooner and order[-1] < order[0], f"overtaken at {evidence}")


def _crossing(curves: Curves, cell: Cell) -> float:
    """The first training set size at which training anew is better; infinite if there is none."""
    sizes = sorted(curves.job.samples)
    better = (num for num in sizes if curves.gap(cell, num, "two_layer").mean > 0)
    return next(better, float("inf"))


def _gain_fades(curves: Curves, knob: Knob) -> Claim:
    text = f"3. The gain over random features fades with {knob} (theory, each at its best penalty)"
    cells = _sweep(curves, knob)
    if len(cells) < 3:
        return Claim(text, None, f"needs a sweep over {knob} of three values or more")
    num = min(curves.job.samples, key=lambda size: abs(size - curves.job.hidden))
    gains = []
    for value in sorted(cells, reverse=knob != "substituted"):
        gain = curves.theory_gain(cells[value], num)
        if gain is None:
            return Claim(text, None, "the theory did not converge in every cell")
        gains.append(gain)
    steps = [difference(after, before) for before, after in pairwise(gains)]
    rises = any(step.mean > 0 and _is_clear(step) for step in steps)
    evidence = f"gain at n={num}: " + ", ".join(f"{mean(gain):+.3f}" for gain in gains)
    return Claim(text, not rises and _is_below_zero(difference(gains[-1], gains[0])), evidence)


def _complex_to_simple(curves: Curves) -> Claim:
    text = "6. From complex to simple is better than from simple to complex"
    target, cells = curves.job.model.target_latent, _sweep(curves, "source_latent")
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
    return Claim(text, all(map(_is_below_zero, gaps.values())), evidence)


def _sweep(curves: Curves, knob: Knob) -> dict[float, Cell]:
    """The cells that differ from the base in `knob` alone, from the largest value to the smallest.

    Includes the base cell; empty if the job does not sweep the knob.
    """
    job = curves.job
    swept = [cell for sweep in job.sweeps if sweep.knob == knob for cell in job.swept(sweep)]
    cells = {cell.value(knob): cell for cell in (job.base(), *swept)} if swept else {}
    return dict(sorted(cells.items(), reverse=True))


def _is_below_zero(gap: Interval) -> bool:
    return gap.mean < 0 and _is_clear(gap)


def _is_clear(gap: Interval) -> bool:
    return gap.half_width is None or gap.excludes_zero


def _signed(gap: Interval) -> str:
    return f"{gap.mean:+.3f}" + ("" if gap.half_width is None else f" ± {gap.half_width:.3f}")
