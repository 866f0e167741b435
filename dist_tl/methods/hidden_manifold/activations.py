"""The non-linearities of the model, and what of them a Gaussian input sees.

With Gaussian input of variance r a function acts, up to second moments, like its mean plus a slope
plus noise: f(s) ~ mean + k1 s + kstar g, with g independent of s. These three numbers carry the
non-linearities into the analytic covariances of `gaussian_model`.

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

# Odd functions keep a symmetric input symmetric: their features have mean zero.
ODD: frozenset[Activation] = frozenset({"tanh", "erf", "identity"})

_REACH = 12.0  # the normal density beyond is below 1e-31
_HALVINGS = 40
_NODES_PER_PANEL = 32


class Coefficients(NamedTuple):
    """What second moments see of f(s), s ~ N(0, r)."""

    mean: float  # E f
    k1: float  # E[s f] / r
    kstar: float  # the root of E f^2 - (E f)^2 - k1^2 r, never negative


def apply(name: Activation, x: Tensor) -> Tensor:
    """f(x), elementwise, in the shape and dtype of `x`.

    Raises:
        ValueError: no activation has this name.
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
    """Mean, k1 and kstar of an activation under N(0, variance).

    relu and identity in closed form, the others by quadrature, to a relative 1e-10.

    Raises:
        ValueError: a variance that is not finite and above 0, or an unknown activation.
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
    # The mean square of what is left, not a difference of mean squares: at small variance all but
    # a part in r^2 would cancel. The mean is zero because f is odd.
    kstar = math.sqrt(float(weight_Q @ (f_Q - slope * g_Q).square()))
    return Coefficients(0.0, slope / deviation, kstar)


@functools.lru_cache(maxsize=1)
def _normal_quadrature() -> tuple[Tensor, Tensor]:
    """Nodes and weights of E[f(g)], g ~ N(0, 1), for f that is sharp at most near 0, float64 (Q,).

    Panels halve towards 0, so that tanh(1e6 g) is as smooth on each of them as tanh(g).
    """
    node, weight = np.polynomial.legendre.leggauss(_NODES_PER_PANEL)
    edge = np.concatenate([[0.0], _REACH * 0.5 ** np.arange(_HALVINGS, -1, -1.0)])
    half = 0.5 * np.diff(edge)[:, None]
    g = (edge[:-1, None] + half * (1 + node)).ravel()
    density = np.exp(-0.5 * g**2) / math.sqrt(2 * math.pi)
    weight = (half * weight).ravel() * density
    return torch.from_numpy(np.r_[-g[::-1], g]), torch.from_numpy(np.r_[weight[::-1], weight])
