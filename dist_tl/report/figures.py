"""Tables, charts and maps of results, ready for a page."""

from collections.abc import Sequence

from dist_tl.report.charts import draw_chart, draw_heat_map
from dist_tl.report.results import Chart, HeatMap, Table
from dist_tl.report.svg import Plot, responsive

TEXT_FROM = 14  # a column whose longest cell has more letters is set as text
Figure = tuple[str, Plot, str]  # title, plot, note


def figures(charts: Sequence[Chart], heat_maps: Sequence[HeatMap]) -> list[Figure]:
    """All charts, then all maps."""
    drawn = [_chart(chart, i) for i, chart in enumerate(charts)]
    return drawn + [_heat_map(heat_map, i) for i, heat_map in enumerate(heat_maps)]


def text_columns(tables: Sequence[Table]) -> dict[str, list[int]]:
    """Columns, from 0, that hold words rather than numbers, by the title of the table."""
    return {table.title: _text_columns(table) for table in tables}


def _text_columns(table: Table) -> list[int]:
    longest = [max((len(row[i]) for row in table.rows), default=0) for i in range(_width(table))]
    return [i for i, length in enumerate(longest) if i == 0 or length > TEXT_FROM]


def _width(table: Table) -> int:
    return len(table.header)


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
