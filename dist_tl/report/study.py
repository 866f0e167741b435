"""HTML report of a study: the tables, charts and heat maps of its results.json."""

from dist_tl.report.figures import figures, text_columns
from dist_tl.report.page import Fact, render, run_facts, timeline_plot
from dist_tl.report.results import StudyResults


def build_study_page(results: StudyResults) -> str:
    """Returns the report as HTML."""
    drawn = figures(results.charts, results.heat_maps)
    timeline = timeline_plot(results.stages)
    if timeline is not None:
        drawn.append(("Timeline", timeline, "Start and end of each group of tasks."))
    return render(
        "study.html",
        results=results,
        verdict=results.verdict,
        figures=drawn,
        text_columns=text_columns(results.tables),
        measured=[Fact(name, value) for name, value in results.facts],
        run_facts=run_facts(results),
    )
