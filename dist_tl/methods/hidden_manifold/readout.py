"""Exact fits of the second layer on frozen features: ridge and logistic.

    min_w  sum_mu loss(y_mu, z_mu) + (lam/2) |w|^2,   z = v w / sqrt(K)

The loss is a sum; for a mean loss divide lam by n. There is no intercept: centre features with a
mean first. Ridge is (y - z)^2 / 2, logistic log(1 + exp(-y z)). With fewer samples than features
the problem is solved in the span of the samples, which contains w.

After Gerace et al., arXiv:2106.05418.

Shape suffixes: N = samples, K = features, R = min(N, K), L = penalties.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dist_tl.errors import NotConvergedError, NumericsError

Loss = Literal["ridge", "logistic"]

MAX_STEPS = 200
GRADIENT_TOLERANCE = 1e-8  # norm of the gradient of the sum

_ARMIJO = 1e-4
_MAX_HALVINGS = 50


def fit_ridge(v_NK: Tensor, y_N: Tensor, lam: float) -> Tensor:
    """Returns the ridge minimiser in closed form, float64 (K,).

    Args:
        v_NK: features, float64.
        y_N: targets, float64, any values.

    Raises:
        ValueError: lam <= 0, or tensors that are not float64 (N, K >= 1) and (N,).
        NumericsError: features are not finite, or lam is below their rounding error.
    """
    _require_problem(v_NK, y_N, [lam])
    a_NK = v_NK / math.sqrt(v_NK.shape[1])
    if len(a_NK) < a_NK.shape[1]:
        return a_NK.T @ _solve(_plus_diagonal(a_NK @ a_NK.T, lam), y_N)
    return _solve(_plus_diagonal(a_NK.T @ a_NK, lam), a_NK.T @ y_N)


def fit_logistic(v_NK: Tensor, y_N: Tensor, lam: float) -> Tensor:
    """Returns the logistic minimiser, float64 (K,), with gradient norm of the sum at most 1e-8.

    Args:
        v_NK: features, float64.
        y_N: labels, float64, -1 or +1.

    Raises:
        ValueError: lam <= 0, labels other than -1 and +1, or tensors that do not fit.
        NotConvergedError: damped Newton ran out of steps.
        NumericsError: features are not finite.
    """
    return fit_path(v_NK, y_N, [lam], "logistic")[0]


def fit_path(v_NK: Tensor, y_N: Tensor, lams: Sequence[float], loss: Loss) -> Tensor:
    """Returns the minimisers for many penalties, float64 (L, K), in the order of `lams`.

    Logistic fits run from the largest penalty down, each starting at the previous solution.

    Raises:
        As `fit_ridge` and `fit_logistic`; ValueError for an unknown loss.
    """
    _require_problem(v_NK, y_N, lams)
    if loss == "ridge":
        return _ridge_path(v_NK / math.sqrt(v_NK.shape[1]), y_N, lams)
    if loss != "logistic":
        raise ValueError(f"expected the loss ridge or logistic, got {loss!r}")
    if not bool((y_N.abs() == 1).all()):
        raise ValueError("expected labels -1 and +1, got other values; map 0/1 labels with 2 y - 1")
    basis_KR, signed_NR = _reduced(y_N[:, None] * v_NK / math.sqrt(v_NK.shape[1]))
    u_R = signed_NR.new_zeros(signed_NR.shape[1])
    w_LK = v_NK.new_empty(len(lams), v_NK.shape[1])
    for i in sorted(range(len(lams)), key=lambda i: -lams[i]):
        u_R = _newton(signed_NR, u_R, lams[i])
        w_LK[i] = u_R if basis_KR is None else basis_KR @ u_R
    return w_LK


def scores(w_K: Tensor, v_NK: Tensor) -> Tensor:
    """Returns z = v w / sqrt(K), (N,)."""
    return v_NK @ w_K / math.sqrt(v_NK.shape[1])


def train_loss(w_K: Tensor, v_NK: Tensor, y_N: Tensor, loss: Loss) -> float:
    """Returns the mean loss over N >= 1 samples without the penalty, the train loss of the theory.

    Raises:
        ValueError: no samples, or an unknown loss.
    """
    _require_samples(v_NK)
    z_N = scores(w_K, v_NK)
    if loss == "ridge":
        return float(0.5 * (y_N - z_N).square().mean())
    if loss == "logistic":
        return float(_log1p_exp(-y_N * z_N).mean())
    raise ValueError(f"expected the loss ridge or logistic, got {loss!r}")


def error_rate(w_K: Tensor, v_NK: Tensor, y_N: Tensor) -> float:
    """Returns the share of N >= 1 samples with a wrong sign; a score of 0 counts as +1.

    Raises:
        ValueError: no samples.
    """
    _require_samples(v_NK)
    return float(((scores(w_K, v_NK) >= 0) != (y_N > 0)).double().mean())


def _ridge_path(a_NK: Tensor, y_N: Tensor, lams: Sequence[float]) -> Tensor:
    left_NR, s_R, right_RK = torch.linalg.svd(a_NK, full_matrices=False)
    lam_L1 = torch.tensor(lams, dtype=torch.float64)[:, None]
    return (s_R / (s_R.square() + lam_L1) * (left_NR.T @ y_N)) @ right_RK


def _reduced(a_NK: Tensor) -> tuple[Tensor | None, Tensor]:
    """Returns an orthonormal basis of the samples' span, and their coordinates in it.

    w lies in that span, and its norm is that of its coordinates. The basis is None (the identity)
    if there are at least as many samples as features.
    """
    if len(a_NK) >= a_NK.shape[1]:
        return None, a_NK
    basis_KR, upper_RN = torch.linalg.qr(a_NK.T)
    return basis_KR, upper_RN.T


def _newton(signed_NR: Tensor, start_R: Tensor, lam: float) -> Tensor:
    """Minimises sum log(1 + exp(-signed u)) + lam/2 |u|^2 by damped Newton steps."""
    u_R, norm = start_R, math.inf
    for _ in range(MAX_STEPS):
        margin_N = signed_NR @ u_R
        wrong_N = torch.sigmoid(-margin_N)
        gradient_R = lam * u_R - signed_NR.T @ wrong_N
        norm = float(gradient_R.norm())
        if norm <= GRADIENT_TOLERANCE:
            return u_R
        root_NR = (wrong_N * torch.sigmoid(margin_N)).sqrt()[:, None] * signed_NR
        step_R = _solve(_plus_diagonal(root_NR.T @ root_NR, lam), -gradient_R)
        slope = float(gradient_R @ step_R)
        u_R = u_R + _damping(signed_NR, u_R, step_R, lam, slope) * step_R
    raise NotConvergedError(
        f"logistic fit at lam = {lam:g} on {len(signed_NR)} samples: gradient norm {norm:.2g} "
        f"after {MAX_STEPS} Newton steps, expected {GRADIENT_TOLERANCE:.0e}; increase lam"
    )


def _damping(signed_NR: Tensor, u_R: Tensor, step_R: Tensor, lam: float, slope: float) -> float:
    """Returns the largest of 1, 1/2, 1/4, ... that satisfies the Armijo condition."""
    margin_N, direction_N = signed_NR @ u_R, signed_NR @ step_R
    linear, square = lam * float(u_R @ step_R), lam * float(step_R.square().sum())
    loss_N = _log1p_exp(-margin_N)
    # Near the optimum the gain is below the rounding error of the sum; then take the full step.
    rounding = 1e-14 * (float(loss_N.sum()) + lam * float(u_R.square().sum()) + 1.0)
    size = 1.0
    for _ in range(_MAX_HALVINGS):
        new_loss_N = _log1p_exp(-(margin_N + size * direction_N))
        change = float((new_loss_N - loss_N).sum()) + size * linear + 0.5 * size**2 * square
        if change <= _ARMIJO * size * slope + rounding:
            return size
        size *= 0.5
    return size


def _log1p_exp(x: Tensor) -> Tensor:
    # torch's softplus returns x itself above 20, which is off by up to 2e-9.
    return torch.logaddexp(x, torch.zeros_like(x))


def _plus_diagonal(square: Tensor, lam: float) -> Tensor:
    square.diagonal().add_(lam)
    return square


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0 or not bool(factor.isfinite().all()):
        raise NumericsError(
            "the fit's matrix is not positive definite: the features' squares overflow, or lam is "
            "below their rounding error; check the features' scale or increase lam"
        )
    return torch.cholesky_solve(right[:, None], factor)[:, 0]


def _require_problem(v_NK: Tensor, y_N: Tensor, lams: Sequence[float]) -> None:
    shapes = tuple(v_NK.shape), tuple(y_N.shape)
    if len(shapes[0]) != 2 or shapes[0][1] < 1 or shapes[1] != shapes[0][:1]:
        raise ValueError(f"expected features (N, K >= 1) and labels (N,), got {shapes}")
    if {v_NK.dtype, y_N.dtype} != {torch.float64}:
        raise ValueError(f"expected float64, got {v_NK.dtype} and {y_N.dtype}")
    if not bool(v_NK.isfinite().all()):
        raise NumericsError("features contain NaN or infinity; check the weights W and the inputs")
    if not all(math.isfinite(lam) and lam > 0 for lam in lams):
        raise ValueError(
            f"expected finite lam > 0, got {list(lams)}; without a penalty a minimum may not exist"
        )


def _require_samples(v_NK: Tensor) -> None:
    if len(v_NK) == 0:
        raise ValueError("expected at least one sample, got none")
