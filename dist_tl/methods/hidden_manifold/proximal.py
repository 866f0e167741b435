"""The logistic proximal step and Gaussian quadrature for the saddle-point equations.

z*(w) = argmin_z (z - w)^2 / (2 V) + log(1 + exp(-z)), and f = (z* - w) / V = sigmoid(-z*).
Not covered: ridge, whose averages have a closed form.

Source: Loureiro et al., "Learning curves of generic features maps for realistic datasets with a
teacher-student model", arXiv:2102.08127; the quadrature is our own.

Shape suffixes: Q = nodes of the quadrature.
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Array = NDArray[np.float64]
REACH = 9.0  # standard deviations; the tails weigh 1e-19
NODES = 32
_NEWTON_STEPS = 60
_NODE, _WEIGHT = np.polynomial.legendre.leggauss(NODES)


def prox_slope(w_Q: Array, v: float) -> Array:
    """Returns f = sigmoid(-z*) for every w, by Newton's method in the bracket [w, w + V].

    Args:
        v: inverse curvature V > 0.
    """
    low_Q, high_Q = w_Q.copy(), w_Q + v
    z_Q, last_Q = 0.5 * (low_Q + high_Q), np.full_like(w_Q, v)
    for _ in range(_NEWTON_STEPS):
        f_Q = expit(-z_Q)
        residual_Q = z_Q - w_Q - v * f_Q
        high_Q = np.where(residual_Q > 0, z_Q, high_Q)
        low_Q = np.where(residual_Q < 0, z_Q, low_Q)
        step_Q = residual_Q / (1 + v * f_Q * (1 - f_Q))
        new_Q = z_Q - step_Q
        # Strictly outside: a root on the edge of its bracket must be accepted. Steps must halve,
        # because Newton may otherwise alternate between the two edges.
        rejected_Q = (new_Q < low_Q) | (new_Q > high_Q) | (2 * np.abs(step_Q) > np.abs(last_Q))
        new_Q = np.where(rejected_Q & (step_Q != 0), 0.5 * (low_Q + high_Q), new_Q)
        last_Q, z_Q = new_Q - z_Q, new_Q
        if np.all(np.abs(last_Q) <= 1e-14 * (1 + np.abs(z_Q))):
            break
    return expit(-z_Q)


def gaussian_nodes(cuts: Iterable[float]) -> tuple[Array, Array]:
    """Returns nodes and weights for means over a standard normal, on panels between `cuts`.

    A single rule over the whole line misses narrow features, which integrands of large margins
    have; so the panels end where the integrand changes.
    """
    inside = {cut for cut in cuts if math.isfinite(cut) and abs(cut) < REACH}
    edges = np.array([-REACH, *sorted(inside), REACH])
    half = 0.5 * np.diff(edges)
    middle = 0.5 * (edges[1:] + edges[:-1])
    node_Q = (middle[:, None] + half[:, None] * _NODE).ravel()
    weight_Q = (half[:, None] * _WEIGHT).ravel()
    return node_Q, weight_Q * np.exp(-0.5 * node_Q**2) / math.sqrt(2 * math.pi)


def sigmoid_cuts(mean: float, deviation: float, v: float) -> list[float]:
    """Returns the x at which f(mean + deviation x) changes its behaviour."""
    s = max(deviation, 1e-300)
    return [-mean / s, (-v - mean) / s, (-8.0 - mean) / s, (8.0 - mean) / s, (-v - 8.0 - mean) / s]
