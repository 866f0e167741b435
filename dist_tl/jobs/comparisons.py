"""Comparisons of two arms in plain sentences, paired by seed."""

from collections.abc import Mapping

from dist_tl.report.results import Interval, interval

ByArm = Mapping[str, Mapping[int, float]]


def paired_gain(left: str, right: str, by_arm: ByArm) -> Interval:
    """`left` less `right`, over the seeds that both have."""
    seeds = by_arm[left].keys() & by_arm[right].keys()
    return interval([by_arm[left][seed] - by_arm[right][seed] for seed in sorted(seeds)])


def against(left: str, right: str, by_arm: ByArm) -> str:
    """A sentence that compares two arms.

    Args:
        by_arm: accuracy by arm and seed.
    """
    gain = paired_gain(left, right, by_arm)
    return f"{left} against {right}: {_points(gain)}, {_judgement(gain)}."


def _points(gain: Interval) -> str:
    text = f"{gain.mean * 100:+.1f} points"
    return text if gain.half_width is None else f"{text} ± {gain.half_width * 100:.1f}"


def _judgement(gain: Interval) -> str:
    if gain.half_width is None:
        return "from one seed: no interval"
    if not gain.excludes_zero:
        return "no difference beyond noise"
    return "better beyond noise" if gain.mean > 0 else "worse beyond noise"
