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


def percent(share: Interval) -> str:
    """A share in per cent with its interval, e.g. "91.2 ± 1.3"."""
    return _with_half_width(percent_points(share.mean), share)


def signed_percent(gain: Interval) -> str:
    """A gain in percentage points with sign and interval, e.g. "+1.2 ± 0.3"."""
    return _with_half_width(f"{100 * gain.mean:+.1f}", gain)


def percent_points(value: float) -> str:
    """A share in per cent with one decimal."""
    return f"{100 * value:.1f}"


def _with_half_width(mean: str, value: Interval) -> str:
    return mean if value.half_width is None else f"{mean} ± {100 * value.half_width:.1f}"


def _points(gain: Interval) -> str:
    text = f"{gain.mean * 100:+.1f} points"
    return _with_half_width(text, gain)


def _judgement(gain: Interval) -> str:
    if gain.half_width is None:
        return "from one seed: no interval"
    if not gain.excludes_zero:
        return "no difference beyond noise"
    return "better beyond noise" if gain.mean > 0 else "worse beyond noise"
