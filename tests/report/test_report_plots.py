"""Plots: lanes that do not overlap, curves grouped by arm, unique ids."""

import math

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_tl.report.plots import draw_timeline, group_curves, mean_curve, pack_lanes, shorten
from dist_tl.report.results import StageRecord
from dist_tl.report.svg import NARROW, WIDE, Drawing, new_figure, responsive

spans = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 15)).map(lambda pair: (pair[0], sum(pair))),
    max_size=25,
).map(sorted)


@given(spans)
def test_spans_of_one_lane_never_overlap_and_lanes_are_minimal(spans):
    lanes = pack_lanes(spans)
    for i, (start, end) in enumerate(spans):
        for j in range(i):
            apart = end <= spans[j][0] or spans[j][1] <= start
            assert apart or lanes[i] != lanes[j]
    max_concurrent = max((sum(a <= t < b for a, b in spans) for t in range(60)), default=0)
    assert max(lanes, default=-1) + 1 == max_concurrent


def test_a_span_may_start_where_another_ends():
    assert pack_lanes([(0, 2), (2, 3), (2.5, 4)]) == [0, 0, 1]


def test_stages_that_differ_only_in_their_seed_share_a_panel():
    row = [{"step": 1, "loss": 1.0}]
    names = ["pp-seed0", "pp-seed11", "p_ssl_seed0", "seed3/p_ssl", "trial"]
    groups = group_curves(dict.fromkeys(names, row))
    assert {name: len(curves) for name, curves in groups.items()} == {
        "pp": 2,
        "p_ssl": 2,
        "trial": 1,
    }


def test_rows_without_a_finite_loss_are_omitted():
    rows = [
        {"step": 3, "loss": 0.5},
        {"step": 1, "loss": math.nan},
        {"step": 2, "accuracy": 0.5},
        {"step": 4, "loss": None},
        {"loss": 1.0},
    ]
    assert group_curves({"pp-seed0": rows, "empty": [], "setup": rows[1:2]}) == {"pp": [{3: 0.5}]}


def test_the_mean_curve_covers_the_steps_that_all_seeds_share():
    assert mean_curve([{1: 1.0, 2: 2.0, 3: 9.0}, {1: 3.0, 2: 4.0}]) == {1: 2.0, 2: 3.0}


@pytest.mark.parametrize("length", [1, 2, 5, 8, 9, 30])
def test_a_shortened_name_keeps_both_ends_and_its_length(length):
    name = "abcdefghi"
    short = shorten(name, length)
    assert len(short) == min(length, len(name))
    if 2 < length < len(name):
        assert short[0] == "a"
        assert short[-1] == "i"


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_a_bar_shows_name_number_or_nothing_depending_on_its_length(width):
    stages = [
        StageRecord(name="long enough", kind="train", started=0, ended=1000),
        StageRecord(name="a name too long for its bar", kind="train", started=1000, ended=1150),
        StageRecord(name="sliver", kind="train", started=1150, ended=1151),
    ]
    axes = draw_timeline(stages, width=width).figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["long enough", "2"]


def test_ids_of_two_plots_on_one_page_never_clash():
    def draw(width):
        figure = new_figure(width, 100)
        figure.add_subplot().plot([0, 1], [0, 1])
        return Drawing(figure)

    first = responsive(draw, name="first", label="a line")
    second = responsive(draw, name="second", label="a line")
    for plot, prefix in [(first, "first"), (second, "second")]:
        ids = [part.split('"')[0] for part in plot.wide.split(' id="')[1:]]
        assert ids
        assert all(one.startswith(f"{prefix}-w-") for one in ids)


def test_an_unknown_kind_of_stage_gets_its_own_lane():
    stages = [
        StageRecord(name="a", kind="train", started=0, ended=10),
        StageRecord(name="b", kind="export", started=5, ended=10),
    ]
    axes = draw_timeline(stages, width=WIDE).figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["train", "export"]


def draw_text(width):
    figure = new_figure(width, 40)
    figure.text(0.1, 0.5, "cost $a_b$ up")
    return Drawing(figure)


def test_dollar_signs_are_not_parsed_as_math():
    assert ">cost $a_b$ up<" in responsive(draw_text, name="text", label="a name").wide


def test_matplotlib_settings_of_user_and_report_are_independent():
    plain = responsive(draw_text, name="text", label="a name")
    with matplotlib.rc_context({"svg.hashsalt": "mine", "font.size": 33, "font.style": "italic"}):
        before = dict(matplotlib.rcParams)
        assert responsive(draw_text, name="text", label="a name") == plain
        assert dict(matplotlib.rcParams) == before
