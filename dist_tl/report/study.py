"""The page of a run that measures: its tables, curves and maps, as results.json gives them."""

from dist_tl.report.figures import figures, text_columns
from dist_tl.report.page import Fact, render, run_facts, timeline_plot
from dist_tl.report.results import StudyResults


def build_study_page(results: StudyResults) -> str:
    """The whole page as text."""
    drawn = figures(results.charts, results.heat_maps)
    if results.stages:
        note = "When each group of tasks was at work."
        drawn.append(("Timeline", timeline_plot(results.stages), note))
    return render(
        "study.html",
        results=results,
        verdict=results.verdict,
        figures=drawn,
        text_columns=text_columns(results.tables),
        measured=[Fact(name, value) for name, value in results.facts],
        run_facts=run_facts(results),
    )
