"""Line charts and heat maps. Every `draw_...` function takes a width in CSS pixels."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from dist_tl.report import svg
from dist_tl.report.results import Chart, HeatMap, Series
from dist_tl.report.svg import Drawing, new_figure

COLORS = (svg.ARM, svg.REFERENCE, svg.GENERATE, svg.TRIAL, svg.OTHER, svg.INK)
MARKERS = "osD^vP"
DASHES = ("-", "--", ":")  # distinguish series once the colours repeat
# Fixed colours for the light and the dark theme: cells have their own background.
LOSS, EVEN, GAIN = "#b35806", "#f7f7f7", "#2166ac"
DARK_TEXT, LIGHT_TEXT = "#1b1f24", "#ffffff"


def draw_chart(chart: Chart, *, width: int) -> Drawing:
    """Draws lines, and points with error bars; the legend is below the axes."""
    wide = width > svg.NARROW
    figure = new_figure(width, (360 if wide else 300) + _legend_height(chart, width))
    axes = figure.add_subplot()
    if chart.zero_line:
        axes.axhline(0, color=svg.MUTED, dashes=(4, 3), lw=1)
    for series in chart.series:
        _draw_series(axes, series)
    if chart.log_x:
        _log_axis(axes, chart)
    else:
        integers = all(x == int(x) for series in chart.series for x in series.x)
        axes.xaxis.set_major_locator(MaxNLocator(8 if wide else 5, integer=integers))
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(length=0)
    axes.grid(axis="y")
    columns = _legend_columns(chart, width)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, labelcolor=svg.INK)
    return Drawing(figure)


def _draw_series(axes: Axes, series: Series) -> None:
    color = COLORS[series.color % len(COLORS)]
    if series.style == "line":
        dashes = DASHES[series.color // len(COLORS) % len(DASHES)]
        axes.plot(series.x, series.y, dashes, color=color, lw=2, label=series.label)
        if series.band is not None:
            low, high = zip(*series.band, strict=True)
            axes.fill_between(series.x, low, high, color=color, alpha=0.15, lw=0)
        return
    marker = MARKERS[series.color % len(MARKERS)]
    axes.errorbar(
        series.x,
        series.y,
        yerr=series.half_width,
        fmt=marker,
        ms=6,
        color=color,
        mec=svg.PAPER,
        elinewidth=1.6,
        label=series.label,
    )


def _log_axis(axes: Axes, chart: Chart) -> None:
    """Sets a logarithmic x axis with ticks at the measured values instead of powers of ten."""
    axes.set_xscale("log")
    values = sorted({x for series in chart.series for x in series.x})
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{value:g}" for value in values])


def _legend_columns(chart: Chart, width: int) -> int:
    longest = max((len(series.label) for series in chart.series), default=1)
    return max(1, min(4, width // (7 * longest + 50)))


def _legend_height(chart: Chart, width: int) -> int:
    rows = -(-len(chart.series) // _legend_columns(chart, width))
    return 22 * rows + 10


def draw_heat_map(heat_map: HeatMap, *, width: int) -> Drawing:
    """Draws one labelled cell per pair of values; a contour marks where the sign changes."""
    cell = min(64, (width - 110) / max(1, len(heat_map.x)))
    height = 46 if cell > 40 else 30
    figure = new_figure(width, 80 + height * len(heat_map.y))
    axes = figure.add_subplot()
    values = np.array(
        [[np.nan if v is None else v for v in row] for row in heat_map.values], dtype=float
    )
    colors, norm = _coloring(heat_map, values)
    for (row, column), value in np.ndenumerate(values):
        _draw_cell(axes, heat_map, row, column, value, colors(norm(value)), small=cell < 44)
    if heat_map.signed and min(values.shape) > 1 and np.nanmin(values) < 0 < np.nanmax(values):
        axes.contour(values, levels=[0.0], colors=[DARK_TEXT], linewidths=2)
    axes.set_xticks(range(len(heat_map.x)), heat_map.x)
    axes.set_yticks(range(len(heat_map.y)), heat_map.y)
    axes.set(
        xlabel=heat_map.x_label,
        ylabel=heat_map.y_label,
        xlim=(-0.5, len(heat_map.x) - 0.5),
        ylim=(-0.5, len(heat_map.y) - 0.5),
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return Drawing(figure)


def _coloring(heat_map: HeatMap, values: np.ndarray) -> tuple[LinearSegmentedColormap, Normalize]:
    if heat_map.signed:
        limit = max(float(np.nanmax(np.abs(values))), 1e-9)
        colormap = LinearSegmentedColormap.from_list("signed", [LOSS, EVEN, GAIN])
        return colormap, Normalize(-limit, limit)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    colormap = LinearSegmentedColormap.from_list("unsigned", [EVEN, GAIN])
    return colormap, Normalize(low, max(high, low + 1e-9))


def _draw_cell(
    axes: Axes,
    heat_map: HeatMap,
    row: int,
    column: int,
    value: float,
    color: tuple[float, ...],
    *,
    small: bool,
) -> None:
    corner = (column - 0.5, row - 0.5)
    if np.isnan(value):
        axes.add_patch(Rectangle(corner, 1, 1, fc="none", ec=svg.LINE))
        return
    hatched = bool(heat_map.insignificant) and heat_map.insignificant[row][column]
    axes.add_patch(Rectangle(corner, 1, 1, fc=color, ec=svg.PAPER, lw=1))
    if hatched:
        axes.add_patch(Rectangle(corner, 1, 1, fc="none", ec="#8c959f", hatch="///", lw=0))
    is_dark = sum(color[:3]) < 1.5
    digits = 0 if small else 1
    text = f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0 turns "-0" into "0"
    axes.text(
        column,
        row,
        text,
        ha="center",
        va="center",
        size=10 if small else 11,
        color=LIGHT_TEXT if is_dark else DARK_TEXT,
        bbox={"fc": color, "ec": "none", "pad": 1.5} if hatched else None,
    )
