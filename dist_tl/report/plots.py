"""Plots of a comparison: accuracy per arm, loss curves, timeline of the stages.

Every `draw_...` function takes a width in CSS pixels and returns a figure of that width.
"""

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter

from dist_tl.report import svg
from dist_tl.report.results import ArmSummary, Score, StageRecord
from dist_tl.report.svg import Drawing, new_figure

KINDS = {
    "generate": svg.GENERATE,
    "train": svg.TRAIN,
    "trial": svg.TRIAL,
    "setup": svg.OTHER,
}
MAX_PANELS = 24
_MAX_CURVE_POINTS = 120
_MARKS = ("first_step_at", "last_commit_at")  # show how far generation and training overlap
_REPEAT = re.compile(r"[-_./ ]?(?:seed|fold)[-_=]?\d+")


def shorten(name: str, length: int) -> str:
    """Shortens `name` to at most `length` characters, with an ellipsis in the middle."""
    if len(name) <= length:
        return name
    tail = (length - 1) // 2
    return f"{name[: length - 1 - tail]}…{name[len(name) - tail :]}"


def draw_accuracy(
    summaries: Sequence[ArmSummary], scores: Sequence[Score], baseline: str, *, width: int
) -> Drawing:
    """Draws one row per arm: mean and 95 % interval above, seeds below, in percent."""
    wide = width > svg.NARROW
    figure = new_figure(width, 52 + (38 if wide else 56) * len(summaries))
    axes = figure.add_subplot()
    for row, summary in enumerate(summaries):
        _arm_row(axes, row, summary, [s.accuracy for s in scores if s.arm == summary.arm])
        if summary.arm == baseline:
            axes.axvline(100 * summary.accuracy.mean, color=svg.MUTED, dashes=(4, 3), lw=1)
        if not wide:
            _name_above(axes, row, summary)
    names = ["\n".join(textwrap.wrap(shorten(s.arm, 56), 30)) for s in summaries]
    axes.set_yticks(range(len(summaries)), names if wide else [""] * len(names))
    axes.set(ylim=(len(summaries) - 0.4, -0.5 if wide else -0.75), xlim=_limits(summaries, scores))
    axes.set_xlabel("accuracy on the test split, %")
    axes.tick_params(length=0)
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(8 if wide else 5))
    return Drawing(figure)


def _arm_row(axes: Axes, row: int, summary: ArmSummary, seeds: Sequence[float]) -> None:
    color = svg.REFERENCE if summary.reference else svg.ARM
    mean, half = summary.accuracy.mean, summary.accuracy.half_width
    dots = [100 * seed for seed in seeds]
    if half is not None:
        below = [row + 0.2] * len(dots)
        axes.scatter(dots, below, s=20, color=color, alpha=0.5, lw=0, clip_on=False)
        ends = [100 * (mean - half), 100 * (mean + half)]
        axes.plot(ends, [row, row], color=color, lw=3.5, solid_capstyle="round")
    axes.plot([100 * mean], [row], "D", color=color, mec=svg.PAPER, ms=9, clip_on=False)


def _name_above(axes: Axes, row: int, summary: ArmSummary) -> None:
    position = {"transform": axes.get_yaxis_transform(), "ha": "left", "va": "bottom"}
    background = {"fc": svg.PAPER, "ec": "none", "pad": 1.0}  # hides the baseline behind the text
    axes.text(0, row - 0.18, shorten(summary.arm, 44), color=svg.INK, bbox=background, **position)


def _limits(summaries: Sequence[ArmSummary], scores: Sequence[Score]) -> tuple[float, float]:
    """Returns axis limits that contain all intervals and seeds, clipped to 0..100 plus a margin."""
    means = [(s.accuracy.mean, s.accuracy.half_width or 0.0) for s in summaries]
    values = [mean - half for mean, half in means] + [mean + half for mean, half in means]
    values += [score.accuracy for score in scores]
    low, high = max(0.0, 100 * min(values)), min(100.0, 100 * max(values))
    margin = max(1.0, 0.06 * (high - low))
    return low - margin, high + margin


def group_curves(
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, list[dict[int, float]]]:
    """Returns loss curves (step -> loss), grouped over stages that differ only in seed or fold.

    Rows without a step or a finite loss are omitted, and so are stages without such rows.
    """
    groups: dict[str, list[dict[int, float]]] = {}
    for stage, rows in metrics.items():
        curve = {
            row["step"]: float(row["loss"])
            for row in rows
            if "step" in row and row.get("loss") is not None and math.isfinite(row["loss"])
        }
        if curve:
            name = _REPEAT.sub("", stage).strip("-_./ ") or stage
            groups.setdefault(name, []).append(dict(sorted(curve.items())))
    return groups


def mean_curve(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Returns the mean over curves at the steps that all of them share."""
    steps = sorted(set(curves[0]).intersection(*curves[1:]))
    return {step: math.fsum(curve[step] for curve in curves) / len(curves) for step in steps}


def _thinned(curve: Mapping[int, float]) -> tuple[list[float], list[float]]:
    """Averages blocks of neighbouring points, which bounds the size of the report."""
    steps, losses = list(curve), list(curve.values())
    size = math.ceil(len(steps) / _MAX_CURVE_POINTS) or 1
    starts = range(0, len(steps), size)
    return (
        [math.fsum(part) / len(part) for part in (steps[i : i + size] for i in starts)],
        [math.fsum(part) / len(part) for part in (losses[i : i + size] for i in starts)],
    )


def draw_losses(groups: Mapping[str, Sequence[Mapping[int, float]]], *, width: int) -> Drawing:
    """Draws the first `MAX_PANELS` groups in panels: one light line per seed, and their mean."""
    shown = list(groups.items())[:MAX_PANELS]
    wide = width > svg.NARROW
    columns = min(4 if wide else 2, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(width, (195 if wide else 170) * rows + 10)
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine), "set by new_figure"
    engine.set(h_pad=0.09)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    # The panels come second: otherwise zip would consume one panel that stays empty.
    for (name, curves), panel in zip(shown, panels, strict=False):
        _loss_panel(panel, curves)
        size = (width // columns - 40) // 7  # characters that fit above a panel
        panel.set_title("\n".join(textwrap.wrap(shorten(name, 2 * size), size)), loc="left")
    for panel in list(panels):
        panel.set_visible(False)
    figure.supxlabel("optimizer step", color=svg.MUTED, size=12)
    return Drawing(figure)


def _loss_panel(axes: Axes, curves: Sequence[Mapping[int, float]]) -> None:
    for curve in curves if len(curves) > 1 else []:
        axes.plot(*_thinned(curve), color=svg.ARM, lw=1, alpha=0.4)
    mean = _thinned(mean_curve(curves))
    axes.plot(*mean, color=svg.ARM, lw=1.8, marker="o" if len(mean[0]) == 1 else None)
    losses = [loss for curve in curves for loss in curve.values()]
    if min(losses) > 0 and max(losses) > 100 * min(losses):
        axes.set_yscale("log")
        # The default formatter uses mathtext, which the style disables.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.tick_params(length=0, labelsize=11, labelcolor=svg.MUTED)
    axes.grid(axis="y")


def pack_lanes(spans: Iterable[tuple[float, float]]) -> list[int]:
    """Assigns a lane to every span so that spans of one lane do not overlap.

    Uses the minimum number of lanes.

    Args:
        spans: (start, end) pairs, sorted by start.
    """
    ends: list[float] = []
    lanes = []
    for start, end in spans:
        free = next((lane for lane, last in enumerate(ends) if last <= start), len(ends))
        ends[free : free + 1] = [end]
        lanes.append(free)
    return lanes


def by_start(stages: Iterable[StageRecord]) -> list[StageRecord]:
    """Returns the stages sorted by start; the report numbers them in this order, from 1."""
    return sorted(stages, key=lambda stage: (stage.started, stage.name))


def draw_timeline(stages: Sequence[StageRecord], *, width: int) -> Drawing:
    """Draws one bar per stage over the seconds since the first start, grouped by kind.

    Depending on its length, a bar shows the name of its stage, its number, or nothing.
    """
    origin = min(stage.started for stage in stages)
    total = max(max(stage.ended for stage in stages) - origin, 1e-3)
    bars = _bars(stages, origin, total / (width - 80))
    count = 1 + max(bar.row for bar in bars)
    height = 22 if count <= 14 else max(9, 320 / count)
    figure = new_figure(width, 60 + height * count)
    axes = figure.add_subplot()
    for bar in bars:
        _draw_bar(axes, bar, with_text=height >= 14)
    _label_kinds(axes, bars)
    axes.set(xlim=(0, total), ylim=(count - 0.5, -0.6), xlabel="seconds since the first start")
    axes.xaxis.set_major_locator(MaxNLocator(8 if width > svg.NARROW else 4))
    axes.tick_params(length=0)
    axes.grid(axis="x")
    return Drawing(figure, {bar.gid: bar.hover_text for bar in bars})


@dataclass(frozen=True)
class _Bar:
    """Bar of one stage; times are in seconds since the start of the first stage."""

    stage: StageRecord
    number: int
    row: float
    start: float
    end: float
    marks: tuple[float, ...]
    seconds_per_pixel: float

    @property
    def gid(self) -> str:
        return f"stage{self.number}"

    @property
    def hover_text(self) -> str:
        length = self.end - self.start
        times = f"{self.start:,.1f} s to {self.end:,.1f} s ({length:,.1f} s)"
        return f"{self.number}. {self.stage.name}: {times}"

    @property
    def text(self) -> str:
        """Stage name, else number, whichever fits into the bar at 7 pixels per character."""
        room = (self.end - self.start) / self.seconds_per_pixel
        fitting = [t for t in (self.stage.name, str(self.number)) if 7 * len(t) + 6 < room]
        return fitting[0] if fitting else ""


def _bars(stages: Sequence[StageRecord], origin: float, seconds_per_pixel: float) -> list[_Bar]:
    """Returns the bars of all stages; kinds are separated by half a row."""
    numbered = list(enumerate(by_start(stages), 1))
    bars: list[_Bar] = []
    first = 0.0
    for kind in [*KINDS, *sorted({stage.kind for stage in stages} - set(KINDS))]:
        members = [(number, stage) for number, stage in numbered if stage.kind == kind]
        lanes = pack_lanes((stage.started, stage.ended) for _, stage in members)
        for (number, stage), lane in zip(members, lanes, strict=True):
            start, end = stage.started - origin, stage.ended - origin
            marks = tuple(stage.figures[m] - origin for m in _MARKS if m in stage.figures)
            bars.append(_Bar(stage, number, first + lane, start, end, marks, seconds_per_pixel))
        first += max(lanes) + 1.5 if lanes else 0
    return bars


def _draw_bar(axes: Axes, bar: _Bar, *, with_text: bool) -> None:
    length = max(bar.end - bar.start, 2 * bar.seconds_per_pixel)
    color = KINDS.get(bar.stage.kind, svg.OTHER)
    outline = {"fc": color, "ec": svg.PAPER, "lw": 0.7, "gid": bar.gid}
    axes.add_patch(Rectangle((bar.start, bar.row - 0.42), length, 0.84, **outline))
    if length > 14 * bar.seconds_per_pixel:
        dots = [mark for mark in bar.marks if bar.start <= mark <= bar.end]
        axes.plot(dots, [bar.row + 0.25] * len(dots), "o", ms=3.5, mew=0, color=svg.ON_BAR)
    if with_text and bar.text:
        style = {"ha": "center", "va": "center_baseline", "size": 10.5, "color": svg.ON_BAR}
        axes.text((bar.start + bar.end) / 2, bar.row, bar.text, **style)


def _label_kinds(axes: Axes, bars: Sequence[_Bar]) -> None:
    rows: dict[str, list[float]] = {}
    for bar in bars:
        rows.setdefault(bar.stage.kind, []).append(bar.row)
    centers = [(min(of_kind) + max(of_kind)) / 2 for of_kind in rows.values()]
    axes.set_yticks(centers, [shorten(kind, 10) for kind in rows])
