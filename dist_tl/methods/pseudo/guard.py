"""The lambda guard: pseudo samples are used only where target labels show that they help.

P-SSL with a weak generator can ruin a model, so a weight above 0 must earn its place: in
stratified cross-validation on the target's training labels it has to beat weight 0 by more than
one standard error of the paired item differences. Not covered: the training runs, which do not
depend on each other and which the job runs side by side.

Shape suffixes: N = target training items.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from pydantic import Field, field_validator

from dist_tl.config import StrictModel

MAX_FOLDS = 5


class GuardConfig(StrictModel):
    """Which weights are tried, and in how many folds."""

    lambdas: tuple[float, ...] | None = Field(
        default=None,
        description="Weights to compare, 0 among them; absent: 0 and the arm's own weight.",
    )
    folds: int | None = Field(
        default=None, ge=2, description="Folds; absent: the smallest class's labels, 5 at most."
    )

    @field_validator("lambdas")
    @classmethod
    def _zero_is_the_reference(cls, lambdas: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if lambdas is None:
            return None
        if 0.0 not in lambdas or len(lambdas) < 2 or min(lambdas) < 0:
            raise ValueError(f"expected 0 and at least one weight above it, got {lambdas}")
        return tuple(sorted(set(lambdas)))

    def candidates(self, weight: float) -> tuple[float, ...]:
        """The weights to train, ascending, 0 first."""
        return self.lambdas if self.lambdas is not None else tuple(sorted({0.0, weight}))


class GuardArm(StrictModel):
    """One weight against weight 0, over the held-out items."""

    weight: float
    accuracy: float = Field(description="Share of the items that are right.")
    difference: float = Field(description="Accuracy minus that of weight 0.")
    standard_error: float | None = Field(description="Of the difference; absent with one item.")
    kept: bool = Field(description="Whether it beats weight 0 by more than one standard error.")


class GuardDecision(StrictModel):
    """The weight to train with, and why."""

    weight: float
    guarded: bool = Field(description="False where the labels did not allow a comparison.")
    reason: str
    arms: tuple[GuardArm, ...] = ()


def num_guard_folds(labels_N: Sequence[int] | np.ndarray, config: GuardConfig) -> int | None:
    """How many folds to use; None where a class has one label only, and no guard is possible."""
    counts = np.unique(np.asarray(labels_N), return_counts=True)[1]
    smallest = int(counts.min()) if len(counts) else 0
    if smallest < 2:
        return None
    return min(MAX_FOLDS if config.folds is None else config.folds, smallest)


def choose_lambda(correct: Mapping[float, Sequence[float] | np.ndarray]) -> GuardDecision:
    """The weight that cross-validation supports.

    Args:
        correct: for each weight, 0 among them, whether (or how far, in [0, 1]) each held-out item
            was right, in the same order of items.

    Returns:
        A weight above 0 only if its mean paired difference to weight 0 exceeds one standard
        error (sample deviation / sqrt(n)); of several, the most accurate, ties to the smaller.

    Raises:
        ValueError: weight 0 is missing, no items, or weights with unequal numbers of items.
    """
    if 0.0 not in correct:
        raise ValueError(f"expected weight 0 among the arms, got {sorted(correct)}")
    scores = {weight: [Fraction(float(x)) for x in row] for weight, row in correct.items()}
    sizes = {len(row) for row in scores.values()}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"expected the same items (at least one) for every arm, got {sizes}")
    arms = tuple(_compare(weight, scores[weight], scores[0.0]) for weight in sorted(scores))
    kept = [arm for arm in arms if arm.kept]
    if not kept:
        reason = "no weight above 0 beats 0 by more than one standard error"
        return GuardDecision(weight=0.0, guarded=True, reason=reason, arms=arms)
    # Accuracies come from exact sums, so ties are exact; arms ascend, and max takes the first.
    best = max(kept, key=lambda arm: arm.accuracy)
    reason = f"beats weight 0 by {best.difference:.4f} (standard error {best.standard_error:.4f})"
    return GuardDecision(weight=best.weight, guarded=True, reason=reason, arms=arms)


def unguarded(weight: float, reason: str) -> GuardDecision:
    """The decision where no comparison is possible or wanted: the weight as asked for, so marked.

    E.g. where :func:`num_guard_folds` is None, because one class has a single label.
    """
    return GuardDecision(weight=weight, guarded=False, reason=reason)


def _compare(weight: float, scores: list[Fraction], reference: list[Fraction]) -> GuardArm:
    differences = [ours - theirs for ours, theirs in zip(scores, reference, strict=True)]
    count = len(differences)
    total = sum(differences, Fraction(0))
    squares = sum((d * d for d in differences), Fraction(0))
    variance = None if count == 1 else (squares - total * total / count) / (count - 1)
    # mean > deviation / sqrt(n) is the same as total > 0 and total^2 > squares. In fractions,
    # because one item won and none lost sits exactly on the border, where rounding would decide.
    return GuardArm(
        weight=weight,
        accuracy=float(sum(scores, Fraction(0)) / count),
        difference=float(total / count),
        standard_error=None if variance is None else math.sqrt(variance / count),
        kept=weight > 0 and total > 0 and total * total > squares,
    )
