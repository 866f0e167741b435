"""The guard keeps a weight only if the labels support it, exact to a single item."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_tl.methods.pseudo.guard import (
    GuardConfig,
    choose_lambda,
    num_guard_folds,
    unguarded,
)


def items(wins, losses, num=40):
    """Weight 0 is correct on half of the items; weight 0.1 gains and loses some of them."""
    reference = np.arange(num) % 2
    ours = reference.copy()
    ours[np.flatnonzero(reference == 0)[:wins]] = 1
    ours[np.flatnonzero(reference == 1)[:losses]] = 0
    return {0.0: reference.astype(bool), 0.1: ours.astype(bool)}


def test_an_equal_arm_is_not_kept_although_its_standard_error_is_zero():
    decision = choose_lambda(items(wins=0, losses=0))
    assert decision.weight == 0.0
    assert decision.guarded
    assert decision.arms[1].standard_error == 0.0


def test_a_worse_arm_is_never_kept():
    assert choose_lambda(items(wins=0, losses=8)).weight == 0.0
    assert choose_lambda(items(wins=3, losses=8)).weight == 0.0


def test_an_arm_within_one_standard_error_is_not_kept():
    assert choose_lambda(items(wins=10, losses=7)).weight == 0.0


@pytest.mark.parametrize("num", [2, 3, 7, 10, 49, 100])
def test_one_gained_item_is_exactly_one_standard_error_and_not_enough(num):
    decision = choose_lambda({0.0: [0] * num, 0.1: [1] + [0] * (num - 1)})
    assert decision.arms[1].difference == pytest.approx(decision.arms[1].standard_error)
    assert decision.weight == 0.0


def test_a_clearly_better_arm_is_kept():
    decision = choose_lambda(items(wins=9, losses=1))
    assert decision.weight == 0.1
    assert decision.arms[1].difference == pytest.approx(8 / 40)


def test_an_arm_that_gains_every_item_is_kept_with_standard_error_zero():
    assert choose_lambda({0.0: [0, 0, 0], 0.1: [1, 1, 1]}).weight == 0.1


def test_a_single_item_supports_nothing():
    decision = choose_lambda({0.0: [0], 0.1: [1]})
    assert decision.weight == 0.0
    assert decision.arms[1].standard_error is None


def test_the_most_accurate_of_several_is_taken_and_ties_go_to_the_smaller():
    reference, good, better = [0] * 9, [1, 1, 1, 1] + [0] * 5, [1] * 6 + [0] * 3
    assert choose_lambda({1.0: better, 0.1: good, 0.0: reference}).weight == 1.0
    assert choose_lambda({1.0: good, 0.1: good, 0.0: reference}).weight == 0.1


def test_a_noisier_arm_cannot_pass_on_its_accuracy_alone():
    reference = np.array([0] * 20 + [1] * 20)
    steady, noisy = reference.copy(), reference.copy()
    steady[:3] = 1
    noisy[:18] = 1
    noisy[20:34] = 0  # 4 more items in total, but 18 gained and 14 lost
    assert choose_lambda({0.0: reference, 0.1: steady, 1.0: noisy}).weight == 0.1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_the_rule_is_the_one_standard_error_rule(pairs):
    reference, ours = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    difference = ours - reference
    error = difference.std(ddof=1) / np.sqrt(len(pairs))
    decision = choose_lambda({0.0: reference, 0.5: ours})
    assert decision.arms[1].difference == pytest.approx(difference.mean())
    assert decision.arms[1].standard_error == pytest.approx(error)
    if not np.isclose(difference.mean(), error):
        assert (decision.weight == 0.5) == (difference.mean() > error)


def test_fractional_scores_are_compared():
    reference = [0.2, 0.4, 0.6, 0.8]
    assert choose_lambda({0.0: reference, 0.1: [x + 0.1 for x in reference]}).weight == 0.1
    assert choose_lambda({0.0: reference, 0.1: [0.3, 0.3, 0.7, 0.7]}).weight == 0.0


def test_the_decision_does_not_depend_on_the_order_of_items():
    correct = items(wins=6, losses=3)
    order = np.random.default_rng(0).permutation(40)
    assert choose_lambda({w: row[order] for w, row in correct.items()}) == choose_lambda(correct)


def test_a_decision_round_trips_through_json():
    decision = choose_lambda(items(wins=9, losses=1))
    assert type(decision).model_validate_json(decision.model_dump_json()) == decision


@pytest.mark.parametrize("correct", [{0.1: [1, 0]}, {0.0: [1, 0], 0.1: [1]}, {0.0: [], 0.1: []}])
def test_arms_that_cannot_be_compared_are_rejected(correct):
    with pytest.raises(ValueError, match="expected"):
        choose_lambda(correct)


# Folds


@pytest.mark.parametrize(
    ("counts", "folds", "expected"),
    [([9, 7], None, 5), ([9, 3], None, 3), ([9, 3], 2, 2), ([4, 4], 9, 4), ([5, 1], None, None)],
)
def test_folds_are_limited_by_the_smallest_class(counts, folds, expected):
    labels = np.repeat(np.arange(len(counts)), counts)
    assert num_guard_folds(labels, GuardConfig(folds=folds)) == expected


def test_one_label_in_a_class_makes_the_result_unguarded():
    assert num_guard_folds([0, 0, 1], GuardConfig()) is None
    decision = unguarded(0.1, "class 1 has one label")
    assert (decision.weight, decision.guarded) == (0.1, False)


# Configuration


def test_the_arms_default_to_zero_and_the_configured_weight():
    assert GuardConfig().candidates(0.1) == (0.0, 0.1)
    assert GuardConfig().candidates(0.0) == (0.0,)
    assert GuardConfig(lambdas=(1.0, 0.0, 0.1)).candidates(0.3) == (0.0, 0.1, 1.0)


@pytest.mark.parametrize("lambdas", [(0.1, 1.0), (0.0,), (0.0, -1.0), ()])
def test_lambdas_without_zero_or_without_another_weight_are_rejected(lambdas):
    with pytest.raises(ValueError, match="expected 0"):
        GuardConfig(lambdas=lambdas)
