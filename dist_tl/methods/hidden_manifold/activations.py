"""The activations of the model and their Gaussian coefficients.

For Gaussian input of variance r a function is equivalent, up to second moments, to its mean plus a
slope plus noise: f(s) ~ mean + k1 s + kstar g, with g independent of s. The analytic covariances of
`gaussian_model` depend on the activation through these three coefficients only.

After Gerace et al., arXiv:2106.05418, and Loureiro et al., arXiv:2102.08127.

Shape suffixes: Q = quadrature nodes.
"""

import functools
import math
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

Activation = Literal["tanh", "relu", "erf", "identity"]

# Odd functions of a symmetric input have mean zero.
ODD: frozenset[Activation] = frozenset({"tanh", "erf", "identity"})

_REACH = 12.0  # the normal density beyond is below 1e-31
_HALVINGS = 40
_NODES_PER_PANEL = 32


class Coefficients(NamedTuple):
    """Coefficients of f(s) up to second moments, s ~ N(0, r)."""

    mean: float  # E f
    k1: float  # E[s f] / r
    kstar: float  # square root of E f^2 - (E f)^2 - k1^2 r, never negative


def apply(name: Activation, x: Tensor) -> Tensor:
    """Applies the activation elementwise; keeps shape and dtype of `x`.

    Raises:
        ValueError: unknown activation.
    """
    if name == "tanh":
        return torch.tanh(x)
    if name == "relu":
        return torch.relu(x)
    if name == "erf":
        return torch.erf(x)
    if name == "identity":
        return x
    raise ValueError(f"expected an activation of {', '.join(get_args(Activation))}, got {name!r}")


@functools.lru_cache(maxsize=1024)
def gaussian_coefficients(name: Activation, variance: float) -> Coefficients:
    """Returns mean, k1 and kstar of an activation under N(0, variance).

    In closed form for relu and identity, by quadrature with relative error 1e-10 for the others.

    Raises:
        ValueError: the variance is not finite and > 0, or unknown activation.
    """
    if not (math.isfinite(variance) and variance > 0):
        raise ValueError(f"expected a finite variance > 0, got {variance}")
    deviation = math.sqrt(variance)
    if name == "relu":
        kstar = deviation * math.sqrt(0.25 - 0.5 / math.pi)
        return Coefficients(deviation / math.sqrt(2 * math.pi), 0.5, kstar)
    if name == "identity":
        return Coefficients(0.0, 1.0, 0.0)
    g_Q, weight_Q = _normal_quadrature()
    f_Q = apply(name, deviation * g_Q)
    slope = float(weight_Q @ (g_Q * f_Q))  # k1 sqrt(r)
    # The mean square of the residual, not a difference of mean squares: for small variance all but
    # a fraction r^2 would cancel. The mean is zero because f is odd.
    kstar = math.sqrt(float(weight_Q @ (f_Q - slope * g_Q).square()))
    return Coefficients(0.0, slope / deviation, kstar)


@functools.lru_cache(maxsize=1)
def _normal_quadrature() -> tuple[Tensor, Tensor]:
    """Returns nodes and weights of E[f(g)], g ~ N(0, 1), float64 (Q,), for f sharp only near 0.

    The panels halve towards 0, so that tanh(1e6 g) is as smooth on each panel as tanh(g).
    """
    node, weight = np.polynomial.legendre.leggauss(_NODES_PER_PANEL)
    edge = np.concatenate([[0.0], _REACH * 0.5 ** np.arange(_HALVINGS, -1, -1.0)])
    half = 0.5 * np.diff(edge)[:, None]
    g = (edge[:-1, None] + half * (1 + node)).ravel()
    density = np.exp(-0.5 * g**2) / math.sqrt(2 * math.pi)
    weight = (half * weight).ravel() * density
    return torch.from_numpy(np.r_[-g[::-1], g]), torch.from_numpy(np.r_[weight[::-1], weight])
