"""The HTML report of a study is complete, self-contained and deterministic."""

import pytest

from dist_tl.report.charts import draw_chart, draw_heat_map
from dist_tl.report.results import (
    Chart,
    HeatMap,
    Series,
    StageRecord,
    StudyResults,
    Table,
    stored_results,
    write_results,
)
from dist_tl.report.study import build_study_page
from dist_tl.report.summary import markdown_tables, tables, verdict
from dist_tl.report.svg import NARROW, WIDE
from dist_tl.storage.objects import ObjectStore

LINE = Series(label="theory", x=(1, 10, 100), y=(0.3, 0.2, 0.1), band=((0.2, 0.4),) * 3)
POINTS = Series(label="measured", x=(1, 10), y=(0.31, 0.2), half_width=(0.01, 0.0), style="points")


def study(**changes):
    values = {
        "run": "runs/<study>",
        "kind": "manifold",
        "fingerprint": "0123456789abcdef",
        "stages": (StageRecord(name="cells", kind="trial", started=1.0, ended=5.0),),
        "findings": ("A <b>finding</b> of 5 %.",),
        "versions": {"python": "3"},
        "wall_seconds": 61.0,
        "peak_memory_bytes": 2**30,
        "verdict": "Nothing & more.",
        "tables": (
            Table(
                title="Numbers", header=("name", "n"), rows=(("a", "1"), ("b", "2")), note="A note."
            ),
        ),
        "charts": (
            Chart(
                title="Curves",
                x_label="n",
                y_label="error, %",
                log_x=True,
                zero_line=True,
                series=(LINE, POINTS),
            ),
        ),
        "heat_maps": (
            HeatMap(
                title="Map",
                x_label="across",
                y_label="up",
                x=("0", "1"),
                y=("0", "1"),
                values=((-1.0, 0.5), (None, 2.0)),
                insignificant=((True, False), (False, False)),
            ),
        ),
        "facts": (("Sizes", "D = 5"),),
        **changes,
    }
    return StudyResults(**values)


def test_the_report_is_complete_escaped_and_deterministic():
    page = build_study_page(study())
    for text in ("Numbers", "A note.", "Curves", "theory", "Map", "across", "D = 5", "Timeline"):
        assert text in page
    assert "Nothing &amp; more." in page
    assert "<b>finding" not in page
    assert "runs/&lt;study&gt;" in page
    assert build_study_page(study()) == page
    for outside in ('src="http', "<script", "<link", "@import"):
        assert outside not in page


def test_a_study_without_figures_has_a_report():
    bare = study(tables=(), charts=(), heat_maps=(), stages=(), facts=(), findings=())
    assert "No findings." in build_study_page(bare)


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.filterwarnings("error")
def test_plots_fit_their_width(width):
    drawn = draw_chart(study().charts[0], width=width)
    assert drawn.figure.get_size_inches()[0] * 72 == pytest.approx(width)
    drawn.figure.canvas.draw()
    many = Chart(
        title="Many",
        x_label="x",
        y_label="y",
        series=tuple(
            LINE.model_copy(update={"label": f"series {i}", "color": i}) for i in range(9)
        ),
    )
    draw_chart(many, width=width).figure.canvas.draw()
    draw_heat_map(study().heat_maps[0], width=width).figure.canvas.draw()


def test_a_heat_map_of_equal_cells_can_be_drawn():
    flat = (
        study()
        .heat_maps[0]
        .model_copy(update={"values": ((0.0, 0.0), (0.0, 0.0)), "signed": False})
    )
    draw_heat_map(flat, width=WIDE).figure.canvas.draw()


def test_results_survive_serialisation(tmp_path):
    store = ObjectStore(tmp_path)
    write_results(store, study())
    assert stored_results(store) == study()


def test_terminal_and_markdown_show_the_same_tables():
    assert tables(study()) == list(study().tables)
    assert verdict(study()) == "Nothing & more."
    assert "| b | 2 |" in markdown_tables(study())
