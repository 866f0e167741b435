"""Intervals agree with closed forms of Student's t; arms are paired by seed."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from dist_tl.report.results import Interval, Score, interval, summarise


def scores_of(arm, by_seed, seconds=10.0, samples=100):
    return [
        Score(
            arm=arm,
            seed=seed,
            accuracy=accuracy,
            correct=round(1000 * accuracy),
            total=1000,
            seconds=seconds,
            samples=samples,
        )
        for seed, accuracy in by_seed.items()
    ]


def test_two_values_give_the_quantile_of_a_cauchy():
    found = interval([1.0, 2.0])
    assert found.mean == 1.5
    assert found.half_width == pytest.approx(math.tan(math.pi * 0.475) * 0.5, rel=1e-9)


def test_three_values_give_the_algebraic_quantile_of_two_degrees():
    p = 0.975
    quantile = (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    assert interval([0.0, 1.0, 2.0]).half_width == pytest.approx(quantile / math.sqrt(3), rel=1e-9)


def test_five_values_agree_with_the_printed_table():
    # Student's t for 4 degrees of freedom, two-sided 95 %: 2.776; 90 %: 2.132.
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    error = math.sqrt(2.5 / 5)
    assert interval(values).half_width == pytest.approx(2.776 * error, abs=5e-4)
    assert interval(values, confidence=0.9).half_width == pytest.approx(2.132 * error, abs=5e-4)


def test_the_interval_covers_the_true_mean_in_95_percent_of_samples():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 4))
    found = [interval(list(row)) for row in draws]
    hits = sum(abs(one.mean - 3.0) <= one.half_width for one in found)
    assert hits / 2000 == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 2000))


def test_one_seed_has_a_mean_and_no_interval():
    assert interval([0.7]) == Interval(mean=0.7, half_width=None, count=1)
    assert not interval([0.7]).excludes_zero


def test_an_empty_list_is_rejected():
    with pytest.raises(ValueError, match="at least one"):
        interval([])


@pytest.mark.parametrize(
    ("mean", "half_width", "excluded"),
    [(0.2, 0.1, True), (-0.2, 0.1, True), (0.1, 0.1, False), (-0.05, 0.1, False), (0, 0, False)],
)
def test_an_interval_that_touches_zero_does_not_exclude_it(mean, half_width, excluded):
    assert Interval(mean=mean, half_width=half_width, count=3).excludes_zero is excluded


def test_seed_effects_cancel_in_the_paired_gain():
    base = {0: 0.5, 1: 0.7, 2: 0.9}
    better = {seed: accuracy + 0.05 for seed, accuracy in base.items()}
    _, summary = summarise(scores_of("scratch", base) + scores_of("pp", better), baseline="scratch")
    assert summary.gain.mean == pytest.approx(0.05)
    assert summary.gain.half_width == pytest.approx(0.0, abs=1e-12)
    assert summary.accuracy.half_width > 0.4


def test_gains_pair_seeds_by_number_and_not_by_position():
    base = scores_of("scratch", {0: 0.5, 1: 0.9})
    other = scores_of("pp", {1: 0.95, 0: 0.55})
    _, summary = summarise(base + other, baseline="scratch")
    assert summary.gain.half_width == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("seeds", [{0: 0.5}, {0: 0.5, 1: 0.5, 2: 0.5}, {0: 0.5, 7: 0.5}])
def test_an_arm_with_other_seeds_than_the_baseline_is_rejected(seeds):
    scores = scores_of("scratch", {0: 0.5, 1: 0.6}) + scores_of("pp", seeds)
    with pytest.raises(ValueError, match="pp has seeds"):
        summarise(scores, baseline="scratch")


def test_a_baseline_without_scores_is_rejected():
    with pytest.raises(ValueError, match="baseline 'scratch'"):
        summarise(scores_of("pp", {0: 0.5}), baseline="scratch")


def test_summaries_keep_the_order_of_the_scores_and_average_the_costs():
    scores = scores_of("pp", {0: 0.6}, seconds=1.0) + scores_of("scratch", {0: 0.5})
    scores += scores_of("scratch", {1: 0.5}, seconds=30.0, samples=300)
    scores += scores_of("pp", {1: 0.6}, seconds=2.0)
    pp, scratch = summarise(
        scores, baseline="scratch", references=("pp",), notes={"pp": "unguarded"}
    )
    assert (pp.arm, scratch.arm) == ("pp", "scratch")
    assert (pp.reference, scratch.reference) == (True, False)
    assert (pp.note, scratch.note) == ("unguarded", "")
    assert (pp.seconds, scratch.seconds, scratch.samples) == (1.5, 20.0, 200.0)
    assert scratch.gain is None


def test_an_accuracy_outside_zero_to_one_is_rejected():
    with pytest.raises(ValidationError):
        scores_of("pp", {0: 1.2})
