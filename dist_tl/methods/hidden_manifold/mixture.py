"""The error of a readout on trained features, by a mixture of Gaussians.

Trained features have a spike along the teacher and are not Gaussian, so the theory of
`saddle_point.py` overestimates the error. Within narrow bins of the teacher's field |theta . c|
they are almost Gaussian: y v is a mixture with one Gaussian per bin, all of one label. Valid if
source and target are the same task; other relations would need bins in both teachers' fields.

Source: section 3.8 of the notes on Gerace et al., arXiv:2106.05418.

Shape suffixes: B = bins, K = features, Q = nodes of the quadrature.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr
from torch import Tensor

from dist_tl.errors import NotConvergedError
from dist_tl.methods.hidden_manifold.proximal import (
    Array,
    gaussian_nodes,
    prox_slope,
    sigmoid_cuts,
)
from dist_tl.methods.hidden_manifold.saddle_point import Loss, check_problem

DAMPING = 0.3
TOLERANCE = 1e-6
MAX_ITERATIONS = 2000


@dataclass(frozen=True, eq=False)
class MixtureParameters:
    """A solution of the mixture theory.

    Attributes:
        m_B, q_B, v_B: mean and variance of the margin y z in each bin, and inverse curvature.
        error: probability of a negative margin.
    """

    alpha: float
    lam: float
    loss: Loss
    m_B: Array
    q_B: Array
    v_B: Array
    error: float
    iterations: int


@dataclass(frozen=True, eq=False)
class _Mixture:
    p_B: Array
    mu_BK: Array
    cov_BKK: Array


def solve_mixture(
    p_B: Tensor,
    mu_BK: Tensor,
    cov_BKK: Tensor,
    *,
    alpha: float,
    lam: float,
    loss: Loss,
    start: MixtureParameters | None = None,
    max_iterations: int = MAX_ITERATIONS,
) -> MixtureParameters:
    """Solves the mixture theory for alpha = n / K samples per feature (3.8).

    Args:
        p_B: share of every bin.
        mu_BK, cov_BKK: mean and covariance of y v in every bin, float64.
        start: a nearby solution as the initial value.

    Raises:
        ValueError: alpha or lam out of range, an unknown loss, or shapes that do not fit.
        NotConvergedError: no convergence; the message names alpha, lam and the last change.
    """
    check_problem(alpha, lam, loss)
    mixture = _Mixture(*(np.asarray(x.double().numpy()) for x in (p_B, mu_BK, cov_BKK)))
    bins, features = mixture.mu_BK.shape
    shapes = mixture.p_B.shape, mixture.mu_BK.shape, mixture.cov_BKK.shape
    if shapes != ((bins,), (bins, features), (bins, features, features)):
        raise ValueError(
            f"expected p (B,), mu (B, K), cov (B, K, K), got {', '.join(map(str, shapes))}"
        )
    if start is None:
        m_B, q_B, v_B = np.full(bins, 0.05), np.full(bins, 0.1), np.ones(bins)
    else:
        m_B, q_B, v_B = start.m_B, start.q_B, start.v_B
    change = math.inf
    for count in range(1, max_iterations + 1):
        update = _step(mixture, m_B, q_B, v_B, alpha, lam, loss)
        if not all(np.isfinite(values).all() for values in update):
            break
        new = [
            (1 - DAMPING) * a + DAMPING * b for a, b in zip(update, (m_B, q_B, v_B), strict=True)
        ]
        change = max(
            float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(a))), 1e-300))
            for a, b in zip(new, (m_B, q_B, v_B), strict=True)
        )
        m_B, q_B, v_B = new
        if change < TOLERANCE:
            error = float(mixture.p_B @ ndtr(-m_B / np.sqrt(q_B)))
            return MixtureParameters(alpha, lam, loss, m_B, q_B, v_B, error, count)
    raise NotConvergedError(
        f"the mixture theory at alpha = {alpha:g}, lam = {lam:g} did not converge in "
        f"{max_iterations} iterations (last relative change {change:.2g}); increase lam"
    )


def _step(
    mixture: _Mixture, m_B: Array, q_B: Array, v_B: Array, alpha: float, lam: float, loss: Loss
) -> tuple[Array, Array, Array]:
    average = _ridge_averages if loss == "ridge" else _logistic_averages
    means = [average(m, q, v) for m, q, v in zip(m_B, q_B, v_B, strict=True)]
    mean_f_B, mean_ff_B, curvature_B = (np.array(column) for column in zip(*means, strict=True))
    m_hat_B, q_hat_B, v_hat_B = (
        alpha * mixture.p_B * values for values in (mean_f_B, mean_ff_B, curvature_B)
    )
    features = mixture.mu_BK.shape[1]
    curved_KK = np.tensordot(v_hat_B, mixture.cov_BKK, axes=1)
    curved_KK[np.diag_indices(features)] += lam
    inverse_KK = np.linalg.inv(curved_KK)
    # The curvature of the means is on the left side; otherwise the iteration diverges for ridge.
    left_KK = curved_KK + (mixture.mu_BK.T * v_hat_B) @ mixture.mu_BK
    x_K = np.linalg.solve(left_KK, mixture.mu_BK.T @ (m_hat_B + v_hat_B * m_B))
    spread_KK = inverse_KK @ np.tensordot(q_hat_B, mixture.cov_BKK, axes=1) @ inverse_KK
    noise_B = np.tensordot(mixture.cov_BKK, spread_KK, axes=([1, 2], [1, 0])) / features
    new_v_B = np.tensordot(mixture.cov_BKK, inverse_KK, axes=([1, 2], [1, 0])) / features
    return mixture.mu_BK @ x_K, (mixture.cov_BKK @ x_K) @ x_K + noise_B, new_v_B


def _ridge_averages(m: float, q: float, v: float) -> tuple[float, float, float]:
    """Returns E f, E f^2 and E[-f'] of f = (1 - z) / (1 + V), z ~ N(m, q)."""
    return (1 - m) / (1 + v), ((1 - m) ** 2 + q) / (1 + v) ** 2, 1 / (1 + v)


def _logistic_averages(m: float, q: float, v: float) -> tuple[float, float, float]:
    deviation = math.sqrt(max(q, 0.0))
    node_Q, weight_Q = gaussian_nodes([0.0, *sigmoid_cuts(m, deviation, v)])
    f_Q = prox_slope(m + deviation * node_Q, v)
    slope_Q = f_Q * (1 - f_Q)
    curvature = float(weight_Q @ (slope_Q / (1 + v * slope_Q)))
    return float(weight_Q @ f_Q), float(weight_Q @ f_Q**2), curvature
