"""Converts charts, heat maps and tables of results to figures of an HTML report."""

from collections.abc import Sequence

from dist_tl.report.charts import draw_chart, draw_heat_map
from dist_tl.report.results import Chart, HeatMap, Table
from dist_tl.report.svg import Plot, responsive

MAX_NUMBER_LENGTH = 14  # a column with longer cells is formatted as text
Figure = tuple[str, Plot, str]  # title, plot, note


def figures(charts: Sequence[Chart], heat_maps: Sequence[HeatMap]) -> list[Figure]:
    """Returns the figures of all charts, then of all heat maps."""
    drawn = [_chart(chart, i) for i, chart in enumerate(charts)]
    return drawn + [_heat_map(heat_map, i) for i, heat_map in enumerate(heat_maps)]


def text_columns(tables: Sequence[Table]) -> dict[str, list[int]]:
    """Returns the indices of the text columns of each table, by table title."""
    return {table.title: _text_columns(table) for table in tables}


def _text_columns(table: Table) -> list[int]:
    columns = range(len(table.header))
    longest = [max((len(row[i]) for row in table.rows), default=0) for i in columns]
    return [i for i, length in enumerate(longest) if i == 0 or length > MAX_NUMBER_LENGTH]


def _chart(chart: Chart, index: int) -> Figure:
    plot = responsive(
        lambda width: draw_chart(chart, width=width),
        name=f"chart{index}",
        label=f"{chart.title}: {chart.y_label} over {chart.x_label}.",
    )
    return chart.title, plot, chart.note


def _heat_map(heat_map: HeatMap, index: int) -> Figure:
    plot = responsive(
        lambda width: draw_heat_map(heat_map, width=width),
        name=f"map{index}",
        label=f"{heat_map.title}, over {heat_map.x_label} and {heat_map.y_label}.",
    )
    return heat_map.title, plot, heat_map.note
