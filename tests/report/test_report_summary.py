"""The verdict names the winner, or states that there is none; tables agree in all formats."""

import pytest

from dist_tl.report.results import ArmSummary, Interval
from dist_tl.report.summary import gain_text, markdown_table, points, table_rows, verdict


def summary(arm, mean, gain=None, half_width=0.01, reference=False):
    count = 1 if half_width is None else 5
    return ArmSummary(
        arm=arm,
        accuracy=Interval(mean=mean, half_width=half_width, count=count),
        gain=None if gain is None else Interval(mean=gain, half_width=half_width, count=count),
        seconds=12.34,
        samples=12_000,
        reference=reference,
    )


def verdict_of(make_results, *others):
    return verdict(make_results(summaries=(summary("scratch", 0.8), *others)))


def test_the_verdict_names_the_winner_its_gain_and_its_interval(make_results):
    sentence = verdict_of(make_results, summary("pp", 0.82, 0.02), summary("p_ssl", 0.85, 0.05))
    assert sentence == (
        "p_ssl won: 85.0 % against 80.0 % for scratch, a gain of 5.0 points "
        "(95 % interval 4.0 to 6.0, 5 seeds)."
    )


def test_a_reference_arm_never_wins(make_results):
    sentence = verdict_of(
        make_results, summary("pp", 0.82, 0.02), summary("finetune", 0.95, 0.15, reference=True)
    )
    assert sentence.startswith("pp won")


def test_a_higher_arm_within_noise_does_not_win_but_is_named(make_results):
    noisy = summary("p_ssl", 0.87, 0.07, half_width=0.09)
    sentence = verdict_of(make_results, noisy, summary("pp", 0.82, 0.02))
    assert sentence.startswith("pp won")
    assert "p_ssl was higher on average (+7.0), but its interval includes zero" in sentence


def test_losing_to_the_baseline_is_stated(make_results):
    sentence = verdict_of(make_results, summary("pp", 0.78, -0.02), summary("p_ssl", 0.7, -0.1))
    assert sentence == (
        "No arm beat scratch (80.0 %): the best of 2, pp, was 2.0 points below "
        "(95 % interval -3.0 to -1.0, 5 seeds)."
    )


def test_a_gain_within_noise_does_not_win(make_results):
    sentence = verdict_of(make_results, summary("pp", 0.805, 0.005))
    assert sentence.startswith("No arm beat scratch (80.0 %) beyond noise: the only one, pp, was")
    assert "0.5 points above" in sentence
    assert "(95 % interval -0.5 to 1.5, 5 seeds)" in sentence


def test_one_seed_cannot_win(make_results):
    sentence = verdict_of(make_results, summary("pp", 0.9, 0.1, half_width=None))
    assert sentence.startswith("One seed cannot show that an arm beats scratch (80.0 %)")
    assert "10.0 points above, which may be chance" in sentence


def test_equal_accuracy_is_reported_as_equal(make_results):
    assert "was equal" in verdict_of(make_results, summary("pp", 0.8, 0.0))


def test_a_baseline_alone_has_nothing_to_compare(make_results):
    assert (
        verdict_of(make_results)
        == "Nothing to compare: only the baseline scratch was run (80.0 %)."
    )


def test_a_run_without_scores_has_no_verdict(make_results):
    results = make_results(scores=(), summaries=())
    assert verdict(results) == "No verdict: the baseline scratch was not scored."


@pytest.mark.parametrize(
    ("gain", "half_width", "text"),
    [
        (0.05, 0.02, "+5.0 ± 2.0 ▲"),
        (-0.05, 0.02, "-5.0 ± 2.0 ▼"),
        (0.01, 0.02, "+1.0 ± 2.0"),
        (0.05, None, "+5.0"),
        (-0.0001, 0.02, "0.0 ± 2.0"),
    ],
)
def test_a_gain_is_marked_only_where_its_interval_excludes_zero(gain, half_width, text):
    assert gain_text(Interval(mean=gain, half_width=half_width, count=2)) == text


def test_points_are_never_minus_zero():
    assert points(-0.0004) == "0.0"
    assert points(-0.0006) == "-0.1"


def test_rows_are_header_arms_references(make_results):
    summaries = (
        summary("finetune", 0.95, 0.15, reference=True),
        summary("scratch", 0.8),
        summary("pp", 0.82, 0.02),
    )
    header, *rows = table_rows(make_results(summaries=summaries))
    assert header == ("arm", "accuracy %", "gain over scratch", "seconds", "samples")
    assert rows == [
        ("scratch", "80.0 ± 1.0", "baseline", "12.3", "12,000"),
        ("pp", "82.0 ± 1.0", "+2.0 ± 1.0 ▲", "12.3", "12,000"),
        ("finetune (reference)", "95.0 ± 1.0", "+15.0 ± 1.0 ▲", "12.3", "12,000"),
    ]


def test_a_single_note_adds_the_note_column(make_results):
    noted = summary("pp", 0.82, 0.02).model_copy(update={"note": "unguarded"})
    header, scratch, pp = table_rows(make_results(summaries=(summary("scratch", 0.8), noted)))
    assert (header[-1], scratch[-1], pp[-1]) == ("note", "", "unguarded")


def test_markdown_has_one_line_per_row_and_keeps_its_columns(make_results):
    odd = summary("a|b\nc", 0.82, 0.02)
    lines = markdown_table(make_results(summaries=(summary("scratch", 0.8), odd))).splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert lines[3] == "| a\\|b c | 82.0 ± 1.0 | +2.0 ± 1.0 ▲ | 12.3 | 12,000 |"
    assert len(lines) == 4
