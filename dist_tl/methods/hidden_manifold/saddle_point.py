"""The generalisation error of a readout on fixed features, by the Gaussian covariate model.

Six scalar equations determine overlaps and errors of ridge and logistic regression in the limit of
many features and samples, from the eigenvalues of the features' covariance and the teacher's
overlap with each eigenvector. The objective is sum loss + (lam / 2) |w|^2, and alpha = n / K.

Source: sections 3.3 to 3.7 of the notes on Gerace et al., arXiv:2106.05418; the equations are those
of Loureiro et al., arXiv:2102.08127.

Shape suffixes: d = latents, K = features, Q = nodes of the quadrature.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import ndtr
from torch import Tensor

from dist_tl.errors import NotConvergedError, NumericsError
from dist_tl.methods.hidden_manifold.proximal import (
    Array,
    gaussian_nodes,
    prox_slope,
    sigmoid_cuts,
)

Loss = Literal["ridge", "logistic"]
MIN_LAM = 1e-6
MAX_ITERATIONS = 20_000
DAMPING = {"ridge": 0.0, "logistic": 0.3}
_PSD_TOLERANCE = 1e-10


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Spectrum of the features' covariance and overlaps of the teacher.

    Attributes:
        omega_K: eigenvalues of the features' covariance, ascending, not negative.
        t_K: squared overlap of the teacher with each eigenvector.
        rho: variance of the teacher.
    """

    omega_K: Array
    t_K: Array
    rho: float

    def floor_error(self) -> float:
        """Returns the error for infinitely many samples and no penalty (3.5)."""
        varying = self.omega_K > 1e-12 * self.omega_K.max()
        explained = float((self.t_K[varying] / self.omega_K[varying]).sum()) / self.rho
        return math.acos(min(1.0, math.sqrt(max(0.0, explained)))) / math.pi


@dataclass(frozen=True)
class OrderParameters:
    """A solution: overlaps, their conjugates, and errors.

    Attributes:
        m, q, v: overlap with the teacher, norm of the readout, inverse curvature.
        m_hat, q_hat, v_hat: their conjugates.
        error: probability of a wrong sign; NaN without a teacher (3.7).
        test_mse: mean squared error on fresh samples; None for logistic.
        train_loss: mean loss on the training samples, without the penalty.
    """

    alpha: float
    lam: float
    loss: Loss
    m: float
    q: float
    v: float
    m_hat: float
    q_hat: float
    v_hat: float
    rho: float
    error: float
    test_mse: float | None
    train_loss: float
    iterations: int


class _Overlaps(NamedTuple):
    v: float
    q: float
    m: float


class _Conjugates(NamedTuple):
    v: float
    q: float
    m: float


def spectrum(psi_dd: Tensor, phi_dK: Tensor, omega_KK: Tensor, teacher_d: Tensor) -> Spectrum:
    """Returns the spectrum of a feature map and one teacher (3.3).

    Args:
        psi_dd, phi_dK, omega_KK: covariances of latents, of latents with features, of features.
        teacher_d: weights of the teacher, entries of order 1.

    Raises:
        NumericsError: omega has a negative eigenvalue, or the teacher has no variance.
    """
    psi, phi, omega, theta = (x.double().numpy() for x in (psi_dd, phi_dK, omega_KK, teacher_d))
    direction_d = theta / math.sqrt(len(theta))
    rho = float(direction_d @ psi @ direction_d)
    if not rho > 0:
        raise NumericsError(f"expected a teacher of positive variance, got {rho}")
    omega_K, basis_KK = np.linalg.eigh(omega)
    if omega_K[0] < -_PSD_TOLERANCE * max(abs(omega_K[-1]), abs(omega_K[0])):
        raise NumericsError(
            f"the features' covariance has the eigenvalue {omega_K[0]:.3g}; expected none below 0: "
            "compute all entries from the same samples"
        )
    overlap_K = basis_KK.T @ (phi.T @ direction_d)
    return Spectrum(np.maximum(omega_K, 0.0), overlap_K**2, rho)


def solve(
    spectrum: Spectrum,
    *,
    alpha: float,
    lam: float,
    loss: Loss,
    start: OrderParameters | None = None,
    tolerance: float = 1e-9,
    max_iterations: int = MAX_ITERATIONS,
) -> OrderParameters:
    """Solves for overlaps and errors at alpha = n / K samples per feature (3.4).

    Args:
        start: a nearby solution as the initial value.
        tolerance: maximum relative change of the overlaps in the last iteration.

    Raises:
        ValueError: alpha or lam out of range, or an unknown loss.
        NotConvergedError: no convergence; the message names alpha, lam and the last change.
    """
    check_problem(alpha, lam, loss)
    conjugates = (_ridge if loss == "ridge" else _logistic)(alpha, spectrum.rho)
    first = _Overlaps(1.0, 0.1, 0.05) if start is None else _Overlaps(start.v, start.q, start.m)
    overlaps, hats, count = _iterate(
        spectrum, conjugates, first, alpha, lam, DAMPING[loss], tolerance, max_iterations
    )
    v, q, m = overlaps
    b = math.sqrt(2 / (math.pi * spectrum.rho))
    mse = 1 + q - 2 * b * m if loss == "ridge" else None
    train = mse / (2 * (1 + v) ** 2) if mse is not None else _train_loss(overlaps, spectrum.rho)
    cosine = m / math.sqrt(spectrum.rho * q)
    error = math.acos(max(-1.0, min(1.0, cosine))) / math.pi
    return _result(alpha, lam, loss, overlaps, hats, spectrum.rho, error, mse, train, count)


def solve_path(
    spectrum: Spectrum, *, alpha: float, lams: Sequence[float], loss: Loss
) -> list[OrderParameters]:
    """Returns solutions for many penalties, in their order; each starts at the next larger one.

    Raises:
        ValueError, NotConvergedError: as :func:`solve`.
    """
    solutions: dict[float, OrderParameters] = {}
    last = None
    for lam in sorted(set(lams), reverse=True):
        last = solve(spectrum, alpha=alpha, lam=lam, loss=loss, start=last, tolerance=1e-6)
        solutions[lam] = last
    return [solutions[lam] for lam in lams]


def solve_real_data(
    omega_K: Array, t_K: Array, rho: float, *, alpha: float, lam: float
) -> OrderParameters:
    """Solves ridge regression on data without a teacher: rho = E[y^2], phi = E[y v] (3.7).

    Args:
        t_K: squared overlaps, (U^T phi)_i^2; noise correction may make some negative.

    Raises:
        ValueError, NotConvergedError: as :func:`solve`.
    """
    check_problem(alpha, lam, "ridge")
    data = Spectrum(np.asarray(omega_K, float), np.asarray(t_K, float), rho)

    def conjugates(o: _Overlaps) -> _Conjugates:
        scale = alpha / (1 + o.v)
        return _Conjugates(scale, scale * (rho + o.q - 2 * o.m) / (1 + o.v), scale)

    first = _Overlaps(1.0, 0.1, 0.05)
    overlaps, hats, count = _iterate(data, conjugates, first, alpha, lam, 0.0, 1e-9, MAX_ITERATIONS)
    mse = rho + overlaps.q - 2 * overlaps.m
    train = mse / (2 * (1 + overlaps.v) ** 2)
    return _result(alpha, lam, "ridge", overlaps, hats, rho, math.nan, mse, train, count)


def check_problem(alpha: float, lam: float, loss: str) -> None:
    """Checks that alpha, lam and loss are in the range of the theory.

    Raises:
        ValueError: one of them is not.
    """
    if loss not in ("ridge", "logistic"):
        raise ValueError(f"expected the loss ridge or logistic, got {loss!r}")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"expected alpha = n / K > 0, got {alpha}")
    if not (lam >= MIN_LAM and math.isfinite(lam)):
        raise ValueError(
            f"expected a penalty lam >= {MIN_LAM:g}, got {lam}: the iteration does not converge on "
            "separable data for smaller penalties"
        )


def _iterate(
    spectrum: Spectrum,
    conjugates: Callable[[_Overlaps], _Conjugates],
    overlaps: _Overlaps,
    alpha: float,
    lam: float,
    damping: float,
    tolerance: float,
    max_iterations: int,
) -> tuple[_Overlaps, _Conjugates, int]:
    change = math.inf
    for count in range(1, max_iterations + 1):
        hats = conjugates(overlaps)
        update = _overlaps(spectrum, hats, lam)
        if not all(math.isfinite(value) for value in (*hats, *update)):
            break
        new = _Overlaps(
            *((1 - damping) * a + damping * b for a, b in zip(update, overlaps, strict=True))
        )
        pairs = zip(new, overlaps, strict=True)
        change = max(abs(a - b) / max(abs(a), 1e-300) for a, b in pairs)
        overlaps = new
        if change < tolerance:
            return overlaps, conjugates(overlaps), count
    raise NotConvergedError(
        f"the saddle point at alpha = {alpha:g}, lam = {lam:g} did not converge in "
        f"{max_iterations} iterations (last relative change {change:.2g}); increase lam"
    )


def _overlaps(spectrum: Spectrum, hats: _Conjugates, lam: float) -> _Overlaps:
    omega_K, t_K = spectrum.omega_K, spectrum.t_K
    shrunk_K = 1 / (lam + hats.v * omega_K)
    v = float(np.mean(omega_K * shrunk_K))
    m = hats.m * float(np.sum(t_K * shrunk_K))
    q = hats.m**2 * float(np.sum(omega_K * t_K * shrunk_K**2))
    return _Overlaps(v, q + hats.q * float(np.mean((omega_K * shrunk_K) ** 2)), m)


def _ridge(alpha: float, rho: float) -> Callable[[_Overlaps], _Conjugates]:
    b = math.sqrt(2 / (math.pi * rho))

    def conjugates(o: _Overlaps) -> _Conjugates:
        scale = alpha / (1 + o.v)
        return _Conjugates(scale, scale * (1 + o.q - 2 * b * o.m) / (1 + o.v), scale * b)

    return conjugates


def _logistic(alpha: float, rho: float) -> Callable[[_Overlaps], _Conjugates]:
    def conjugates(o: _Overlaps) -> _Conjugates:
        node_Q, weight_Q, f_Q = _teacher_average(o, rho)
        slope_Q = f_Q * (1 - f_Q)
        v_hat = alpha * float(weight_Q @ (slope_Q / (1 + o.v * slope_Q)))
        q_hat = alpha * float(weight_Q @ f_Q**2)
        # Integrated by parts, to avoid a narrow peak for a nearly deterministic teacher.
        deviation = math.sqrt(max(o.q - o.m**2 / rho, 1e-300))
        node_Q, weight_Q = gaussian_nodes([0.0, *sigmoid_cuts(0.0, deviation, o.v)])
        mean_f = float(weight_Q @ prox_slope(deviation * node_Q, o.v))
        return _Conjugates(v_hat, q_hat, alpha * math.sqrt(2 / (math.pi * rho)) * mean_f)

    return conjugates


def _teacher_average(o: _Overlaps, rho: float) -> tuple[Array, Array, Array]:
    """Returns nodes, weights (including the teacher's label) and f for averages E[Z ...]."""
    deviation = math.sqrt(o.q)
    certainty = math.sqrt(max(rho - o.m**2 / o.q, 1e-300) * o.q) / max(abs(o.m), 1e-300)
    cuts = [0.0, *sigmoid_cuts(0.0, deviation, o.v)]
    cuts += [sign * size * certainty for sign in (-1, 1) for size in (2, 6)]
    node_Q, weight_Q = gaussian_nodes(cuts)
    label_Q = 2 * ndtr(math.copysign(1.0, o.m) * node_Q / certainty)
    return node_Q, weight_Q * label_Q, prox_slope(deviation * node_Q, o.v)


def _train_loss(o: _Overlaps, rho: float) -> float:
    node_Q, weight_Q, f_Q = _teacher_average(o, rho)
    z_Q = math.sqrt(o.q) * node_Q + o.v * f_Q
    return float(weight_Q @ np.logaddexp(0.0, -z_Q))


def _result(
    alpha: float,
    lam: float,
    loss: Loss,
    overlaps: _Overlaps,
    hats: _Conjugates,
    rho: float,
    error: float,
    mse: float | None,
    train: float,
    count: int,
) -> OrderParameters:
    return OrderParameters(
        alpha=alpha,
        lam=lam,
        loss=loss,
        m=overlaps.m,
        q=overlaps.q,
        v=overlaps.v,
        m_hat=hats.m,
        q_hat=hats.q,
        v_hat=hats.v,
        rho=rho,
        error=error,
        test_mse=mse,
        train_loss=train,
        iterations=count,
    )
