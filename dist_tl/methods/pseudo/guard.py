"""The lambda guard: pseudo samples are used only if target labels show that they help.

P-SSL with a weak generator can degrade a model. A weight above 0 is therefore used only if, in
stratified cross-validation on the target's training labels, it exceeds weight 0 by more than one
standard error of the paired item differences. Not covered: the training runs, which are independent
of each other and which the job runs in parallel.

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
    """Candidate weights and number of folds."""

    lambdas: tuple[float, ...] | None = Field(
        default=None,
        description="Weights to compare, including 0; absent: 0 and the arm's own weight.",
    )
    folds: int | None = Field(
        default=None,
        ge=2,
        description="Number of folds; absent: number of labels of the smallest class, at most 5.",
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
        """Returns the weights to train, ascending, 0 first."""
        return self.lambdas if self.lambdas is not None else tuple(sorted({0.0, weight}))


class GuardArm(StrictModel):
    """Comparison of one weight with weight 0 on the held-out items."""

    weight: float
    accuracy: float = Field(description="Share of correct items.")
    difference: float = Field(description="Accuracy minus that of weight 0.")
    standard_error: float | None = Field(
        description="Standard error of the difference; absent for one item."
    )
    kept: bool = Field(description="Whether it exceeds weight 0 by more than one standard error.")


class GuardDecision(StrictModel):
    """The weight to train with and the reason."""

    weight: float
    guarded: bool = Field(
        description="Whether weights were compared; false if the labels do not allow it."
    )
    reason: str
    arms: tuple[GuardArm, ...] = ()


def num_guard_folds(labels_N: Sequence[int] | np.ndarray, config: GuardConfig) -> int | None:
    """Returns the number of folds, or None if a class has one label only (no guard is possible)."""
    counts = np.unique(np.asarray(labels_N), return_counts=True)[1]
    smallest = int(counts.min()) if len(counts) else 0
    if smallest < 2:
        return None
    return min(MAX_FOLDS if config.folds is None else config.folds, smallest)


def choose_lambda(correct: Mapping[float, Sequence[float] | np.ndarray]) -> GuardDecision:
    """Selects a weight by cross-validation.

    Args:
        correct: for each weight, including 0, the score in [0, 1] of each held-out item (1:
            correct), in the same order of items.

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
        reason = "no weight above 0 exceeds weight 0 by more than one standard error"
        return GuardDecision(weight=0.0, guarded=True, reason=reason, arms=arms)
    # Accuracies come from exact sums, so ties are exact; arms ascend, and max takes the first.
    best = max(kept, key=lambda arm: arm.accuracy)
    reason = f"exceeds weight 0 by {best.difference:.4f} (standard error {best.standard_error:.4f})"
    return GuardDecision(weight=best.weight, guarded=True, reason=reason, arms=arms)


def unguarded(weight: float, reason: str) -> GuardDecision:
    """Returns the configured weight, marked as not guarded, if no comparison is possible or wanted.

    Example: :func:`num_guard_folds` is None, because a class has a single label.
    """
    return GuardDecision(weight=weight, guarded=False, reason=reason)


def _compare(weight: float, scores: list[Fraction], reference: list[Fraction]) -> GuardArm:
    differences = [one - zero for one, zero in zip(scores, reference, strict=True)]
    count = len(differences)
    total = sum(differences, Fraction(0))
    squares = sum((d * d for d in differences), Fraction(0))
    variance = None if count == 1 else (squares - total * total / count) / (count - 1)
    # mean > deviation / sqrt(n) is equivalent to total > 0 and total^2 > squares. In fractions,
    # because one item gained and none lost is exactly on the threshold, where rounding matters.
    return GuardArm(
        weight=weight,
        accuracy=float(sum(scores, Fraction(0)) / count),
        difference=float(total / count),
        standard_error=None if variance is None else math.sqrt(variance / count),
        kept=weight > 0 and total > 0 and total * total > squares,
    )
