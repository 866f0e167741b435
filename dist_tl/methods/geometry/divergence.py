"""Divergence between source and target, and its rank correlation with the transfer error.

The distribution of a data set is its mean activation over non-negative features, normalised to one.

The notes on Kender et al., arXiv:2207.03554, section "Divergence forecast". All divergences are in
nats.

Shape suffixes: N = items, D = features, P = (source, target) pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

EPSILON = 1e-6
RESAMPLES = 2000
MIN_PAIRS = 5


def activation_distribution(features_ND: Tensor) -> Tensor:
    """Returns the mean activations as a probability vector, float64 (D,), all entries positive.

    Raises:
        ValueError: a feature is negative or not finite, or all features are zero.
    """
    features_ND = features_ND.double()
    if not bool((features_ND >= 0).all()) or not bool(features_ND.isfinite().all()):
        raise ValueError("expected non-negative finite features, e.g. after a ReLU")
    mean_D = features_ND.mean(dim=0)
    if not float(mean_D.sum()) > 0:
        raise ValueError("expected at least one feature above zero")
    smoothed_D = mean_D + EPSILON * mean_D.mean()
    return smoothed_D / smoothed_D.sum()


def kl_divergence(p_D: Tensor, q_D: Tensor) -> float:
    """Returns KL(p || q) in nats, with 0 log 0 = 0."""
    return max(0.0, float(torch.special.xlogy(p_D, p_D / q_D).sum()))


def js_divergence(p_D: Tensor, q_D: Tensor) -> float:
    """Returns the Jensen-Shannon divergence in nats: symmetric, at most log 2."""
    middle_D = 0.5 * (p_D + q_D)
    return 0.5 * (kl_divergence(p_D, middle_D) + kl_divergence(q_D, middle_D))


@dataclass(frozen=True)
class RankForecast:
    """Rank correlation of divergence and error.

    Attributes:
        rho: Spearman's rank correlation.
        low, high: 95 % bootstrap interval over pairs; None for fewer than five pairs.
        left_out_error: mean absolute error of linear fits to the pairs of all other targets.
        pairs: number of pairs.
    """

    rho: float
    low: float | None
    high: float | None
    left_out_error: float
    pairs: int


def rank_forecast(
    divergence_P: Sequence[float],
    error_P: Sequence[float],
    target_P: Sequence[str],
    *,
    rng: np.random.Generator,
) -> RankForecast:
    """Computes how well the divergence of source and target predicts the error on the target.

    Raises:
        ValueError: fewer than three pairs, or sequences of unequal length.
    """
    x_P, y_P = np.asarray(divergence_P, float), np.asarray(error_P, float)
    if len(x_P) < 3 or not len(x_P) == len(y_P) == len(target_P):
        raise ValueError(
            f"expected at least three pairs, got {len(x_P)} divergences, {len(y_P)} errors and "
            f"{len(target_P)} targets"
        )
    low = high = None
    if len(x_P) >= MIN_PAIRS:
        samples = [_resampled_rho(x_P, y_P, rng) for _ in range(RESAMPLES)]
        low, high = (float(v) for v in np.nanquantile(samples, (0.025, 0.975)))
    return RankForecast(_rho(x_P, y_P), low, high, _left_out_error(x_P, y_P, target_P), len(x_P))


def _rho(x_P: np.ndarray, y_P: np.ndarray) -> float:
    if np.ptp(x_P) == 0 or np.ptp(y_P) == 0:
        return math.nan  # equal values have no ranking
    # SciPy creates the result class at run time, so pyright does not know its fields.
    return float(stats.spearmanr(x_P, y_P).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def _resampled_rho(x_P: np.ndarray, y_P: np.ndarray, rng: np.random.Generator) -> float:
    rows = rng.integers(len(x_P), size=len(x_P))
    return _rho(x_P[rows], y_P[rows])


def _left_out_error(x_P: np.ndarray, y_P: np.ndarray, target_P: Sequence[str]) -> float:
    targets = np.asarray(target_P)
    errors = []
    for target in dict.fromkeys(target_P):
        left_out = targets == target
        if (~left_out).sum() < 2 or np.ptp(x_P[~left_out]) == 0:
            continue
        slope, offset = np.polyfit(x_P[~left_out], y_P[~left_out], 1)
        errors += np.abs(slope * x_P[left_out] + offset - y_P[left_out]).tolist()
    return float(np.mean(errors)) if errors else math.nan
