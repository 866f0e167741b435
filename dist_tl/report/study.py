"""The page of a run that measures: its tables, curves and maps, as results.json gives them."""

from dist_tl.report.charts import draw_chart, draw_heat_map
from dist_tl.report.page import Fact, render, run_facts, timeline_plot
from dist_tl.report.svg import Plot, responsive
from dist_tl.results import Chart, HeatMap, StudyResults, Table

TEXT_FROM = 14  # a column whose longest cell has more letters is set as text


def build_study_page(results: StudyResults) -> str:
    """The whole page as text."""
    figures = [_chart(chart, i) for i, chart in enumerate(results.charts)]
    figures += [_heat_map(heat_map, i) for i, heat_map in enumerate(results.heat_maps)]
    if results.stages:
        note = "When each group of tasks was at work."
        figures.append(("Timeline", timeline_plot(results.stages), note))
    return render(
        "study.html",
        results=results,
        verdict=results.verdict,
        figures=figures,
        text_columns={table.title: _text_columns(table) for table in results.tables},
        measured=[Fact(name, value) for name, value in results.facts],
        run_facts=run_facts(results),
    )


def _text_columns(table: Table) -> list[int]:
    """Columns, from 0, that hold words rather than numbers."""
    longest = [max((len(row[i]) for row in table.rows), default=0) for i in range(_width(table))]
    return [i for i, length in enumerate(longest) if i == 0 or length > TEXT_FROM]


def _width(table: Table) -> int:
    return len(table.header)


def _chart(chart: Chart, index: int) -> tuple[str, Plot, str]:
    plot = responsive(
        lambda width: draw_chart(chart, width=width),
        name=f"chart{index}",
        label=f"{chart.title}: {chart.y_label} over {chart.x_label}.",
    )
    return chart.title, plot, chart.note


def _heat_map(heat_map: HeatMap, index: int) -> tuple[str, Plot, str]:
    plot = responsive(
        lambda width: draw_heat_map(heat_map, width=width),
        name=f"map{index}",
        label=f"{heat_map.title}, over {heat_map.x_label} and {heat_map.y_label}.",
    )
    return heat_map.title, plot, heat_map.note
