"""Forecasts the error of ridge regression on a feature map for any number of labelled samples.

The theory of ridge regression needs no teacher: the covariance of the features, from unlabelled
data, and their correlation with the labels, from a few labelled items, determine the mean squared
error for any number of labels. The noise of that correlation would bias the forecast and is
subtracted.

Source: sections 3.7 and 8 of the notes on Gerace et al., arXiv:2106.05418.

Shape suffixes: P = unlabelled pool, N = labelled items, K = features, C = classes, S = sizes n,
L = penalties, R = bootstrap samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dist_tl.errors import ConfigError, NumericsError
from dist_tl.methods.hidden_manifold.saddle_point import solve_real_data

Array = NDArray[np.float64]
POOL_PER_FEATURE, LABELS_PER_FEATURE = 10, 5
UNRELIABLE_SHARE, UNRELIABLE_ERRORS = 0.10, 3.0


@dataclass(frozen=True, eq=False)
class Forecast:
    """Mean squared error for each size, at its best penalty.

    Attributes:
        sizes_S: numbers of labelled samples.
        mse_S: error for centred one-vs-rest labels -1 and +1, averaged over classes.
        lam_S: best penalty.
        low_S, high_S: 95 % bootstrap band over the labelled items.
    """

    sizes_S: NDArray[np.int64]
    mse_S: Array
    lam_S: Array
    low_S: Array
    high_S: Array


@dataclass(frozen=True, eq=False)
class Measured:
    """Held-out errors of ridge fits on random labelled subsets.

    Attributes:
        sizes_S: numbers of labelled samples.
        mse_S, error_S: mean over draws and its standard error.
        accuracy_S: share of held-out items whose correct class has the highest score.
    """

    sizes_S: NDArray[np.int64]
    mse_S: Array
    error_S: Array
    accuracy_S: Array


@dataclass(frozen=True, eq=False)
class Components:
    """Leading principal components: (v - mean) @ directions."""

    mean_F: Array
    directions_FK: Array

    def apply(self, features_NF: Array) -> Array:
        """Projects features (N, F) to (N, K)."""
        return (np.asarray(features_NF, float) - self.mean_F) @ self.directions_FK


def principal_components(pool_PF: Array, count: int) -> Components:
    """Returns the `count` directions of largest variance in the pool.

    They are scaled by sqrt(count / F), so that penalties are comparable to those of all F features.

    Raises:
        ConfigError: more components than features or pool items.
    """
    pool_PF = np.asarray(pool_PF, float)
    if not 1 <= count <= min(pool_PF.shape):
        raise ConfigError(
            f"components: expected 1 to {min(pool_PF.shape)} (number of features or pool items), "
            f"got {count}"
        )
    mean_F = pool_PF.mean(axis=0)
    values_F, vectors_FF = np.linalg.eigh(
        np.cov(pool_PF, rowvar=False, bias=True).reshape(pool_PF.shape[1], pool_PF.shape[1])
    )
    leading = np.argsort(values_F)[::-1][:count]
    return Components(mean_F, vectors_FF[:, leading] * math.sqrt(count / pool_PF.shape[1]))


def forecast_curve(
    pool_PK: Array,
    labelled_NK: Array,
    labels_N: Sequence[int] | NDArray[np.int64],
    *,
    num_classes: int,
    sizes: Sequence[int],
    lams: Sequence[float],
    num_bootstrap: int = 0,
    rng: np.random.Generator | None = None,
) -> Forecast:
    """Forecasts the error of ridge regression on these features for n labels.

    Args:
        pool_PK: features of unlabelled items, P >= 10 K.
        labelled_NK: features of labelled items, N >= 5 K.
        num_bootstrap: number of bootstrap samples for the band; 0: the band is the curve itself.

    Raises:
        ConfigError: too few items for the number of features, n < 1, or fewer than two classes.
        NumericsError: a feature is not finite, or all features are constant.
        NotConvergedError: the iteration does not converge for some n and penalty.
    """
    pool_PK, labelled_NK = np.asarray(pool_PK, float), np.asarray(labelled_NK, float)
    labels_N = np.asarray(labels_N, np.int64)
    _check_inputs(pool_PK, labelled_NK, labels_N, num_classes, sizes)
    if not len(lams):
        raise ConfigError("expected at least one penalty lam, got none")
    mean_K = pool_PK.mean(axis=0)
    omega_K, basis_KK = np.linalg.eigh(
        np.cov(pool_PK, rowvar=False, bias=True).reshape(len(mean_K), len(mean_K))
    )
    if not omega_K[-1] > 0:
        raise NumericsError("no feature varies over the pool; use another feature map")
    rotated_NK = (labelled_NK - mean_K) @ basis_KK
    theory = _RidgeTheory(np.maximum(omega_K, 0.0), tuple(sizes), tuple(lams), num_classes)
    mse_SL = theory.errors(rotated_NK, labels_N)
    best_S = mse_SL.argmin(axis=1)
    rows_S = np.arange(len(sizes))
    low_S = high_S = mse_SL[rows_S, best_S]
    if num_bootstrap:
        if rng is None:
            raise ValueError("expected rng, the generator of the bootstrap, got None")
        draws_RS = np.array(
            [theory.resampled(rotated_NK, labels_N, rng) for _ in range(num_bootstrap)]
        )
        low_S, high_S = np.quantile(draws_RS, (0.025, 0.975), axis=0)
    return Forecast(
        sizes_S=np.asarray(sizes, np.int64),
        mse_S=mse_SL[rows_S, best_S],
        lam_S=np.asarray(lams, float)[best_S],
        low_S=low_S,
        high_S=high_S,
    )


@dataclass(frozen=True, eq=False)
class _RidgeTheory:
    """The theory for the pool's spectrum, at given sizes and penalties."""

    omega_K: Array
    sizes: tuple[int, ...]
    lams: tuple[float, ...]
    num_classes: int

    def errors(self, rotated_NK: Array, labels_N: NDArray[np.int64]) -> Array:
        """Returns mean squared errors (S, L), averaged over classes."""
        return self._table(self._terms(rotated_NK, labels_N))

    def _terms(self, rotated_NK: Array, labels_N: NDArray[np.int64]) -> tuple[Array, float]:
        # The error is linear in both terms, so their means over classes give the mean error.
        classes = range(self.num_classes)
        terms = [teacher_terms(rotated_NK, one_vs_rest(labels_N, c)) for c in classes]
        return np.mean([t_K for t_K, _ in terms], axis=0), float(np.mean([r for _, r in terms]))

    def _table(self, terms: tuple[Array, float]) -> Array:
        table_SL = np.zeros((len(self.sizes), len(self.lams)))
        for s, size in enumerate(self.sizes):
            for i, lam in enumerate(self.lams):
                table_SL[s, i] = self._mse(*terms, size, lam)
        return table_SL

    def resampled(
        self, rotated_NK: Array, labels_N: NDArray[np.int64], rng: np.random.Generator
    ) -> Array:
        """Returns the best errors (S,) for one bootstrap sample of the labelled items."""
        rows_N = rng.integers(len(labels_N), size=len(labels_N))
        t_K, rho = self._terms(rotated_NK[rows_N], labels_N[rows_N])
        # Resampling adds the labels' noise once more, which the correction does not cover: the
        # resampled terms scatter around the uncorrected ones. This known offset is subtracted.
        classes = range(self.num_classes)
        excess_CK = [
            plain_terms(rotated_NK, one_vs_rest(labels_N, c))
            - teacher_terms(rotated_NK, one_vs_rest(labels_N, c))[0]
            for c in classes
        ]
        return self._table((t_K - np.mean(excess_CK, axis=0), rho)).min(axis=1)

    def _mse(self, t_K: Array, rho: float, size: int, lam: float) -> float:
        alpha = size / len(self.omega_K)
        solution = solve_real_data(self.omega_K, t_K, rho, alpha=alpha, lam=lam)
        assert solution.test_mse is not None, "ridge has a squared error"
        return solution.test_mse


def one_vs_rest(labels_N: NDArray[np.int64], label: int) -> Array:
    """Returns centred labels -1 and +1, float64."""
    y_N = np.where(labels_N == label, 1.0, -1.0)
    return y_N - y_N.mean()


def plain_terms(rotated_NK: Array, y_N: Array) -> Array:
    """Returns the squared overlaps mean(y z_i)^2, without noise correction."""
    return (y_N[:, None] * rotated_NK).mean(axis=0) ** 2


def teacher_terms(rotated_NK: Array, y_N: Array) -> tuple[Array, float]:
    """Returns the squared overlaps t_i of labels and features, corrected for noise, and rho.

    Unbiased: t_i = (mean(y z_i)^2 - mean(y^2 z_i^2) / N) / (1 - 1/N), which may be negative.
    """
    count = len(y_N)
    product_NK = y_N[:, None] * rotated_NK
    noise_K = np.square(product_NK).mean(axis=0) / count
    t_K = (product_NK.mean(axis=0) ** 2 - noise_K) / (1 - 1 / count)
    return t_K, float(np.square(y_N).mean())


def held_out_curve(
    features_NK: Array,
    labels_N: Sequence[int] | NDArray[np.int64],
    *,
    num_classes: int,
    sizes: Sequence[int],
    lams: Sequence[float],
    draws: int,
    rng: np.random.Generator,
) -> Measured:
    """Measures ridge regression fitted on n random labelled items, tested on all others.

    Args:
        lams: the forecast's penalty for each size.

    Raises:
        ConfigError: a size leaves no items for the test.
    """
    features_NK, labels_N = np.asarray(features_NK, float), np.asarray(labels_N, np.int64)
    if draws < 1:
        raise ConfigError(f"expected draws >= 1, got {draws}")
    if not len(sizes) or max(sizes) >= len(labels_N) or min(sizes) < 1:
        raise ConfigError(
            f"held-out sizes: expected 1 to {len(labels_N) - 1} of {len(labels_N)} labelled items, "
            f"got {list(sizes)}"
        )
    features_NK = features_NK - features_NK.mean(axis=0)  # no intercept, as in the forecast
    mse, accuracy = np.zeros((len(sizes), draws)), np.zeros((len(sizes), draws))
    for draw in range(draws):
        order_N = rng.permutation(len(labels_N))
        for s, (size, lam) in enumerate(zip(sizes, lams, strict=True)):
            train, test = order_N[:size], order_N[size:]
            mse[s, draw], accuracy[s, draw] = _held_out(
                features_NK, labels_N, train, test, num_classes, lam
            )
    return Measured(
        sizes_S=np.asarray(sizes, np.int64),
        mse_S=mse.mean(axis=1),
        error_S=mse.std(axis=1, ddof=1) / math.sqrt(draws) if draws > 1 else np.full(len(mse), 0.0),
        accuracy_S=accuracy.mean(axis=1),
    )


def _held_out(
    features_NK: Array,
    labels_N: NDArray[np.int64],
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    num_classes: int,
    lam: float,
) -> tuple[float, float]:
    """Returns the mean squared error over classes and the accuracy on the test items."""
    target_NC = np.where(labels_N[:, None] == np.arange(num_classes), 1.0, -1.0)
    offset_C = target_NC.mean(axis=0)  # of all labelled items, as in the forecast
    scale = math.sqrt(features_NK.shape[1])
    a_nK = features_NK[train] / scale
    gram_KK = a_nK.T @ a_nK + lam * np.eye(a_nK.shape[1])
    w_KC = np.linalg.solve(gram_KK, a_nK.T @ (target_NC[train] - offset_C))
    z_MC = features_NK[test] / scale @ w_KC
    mse = float(np.mean((target_NC[test] - offset_C - z_MC) ** 2))
    return mse, float(np.mean((z_MC + offset_C).argmax(axis=1) == labels_N[test]))


def is_reliable(forecast: Forecast, measured: Measured) -> list[bool]:
    """Returns for every measured size whether forecast and measurement agree.

    They disagree if their difference exceeds both 10 % of the error and 3 standard errors.
    """
    verdicts = []
    for s, size in enumerate(measured.sizes_S):
        [index] = np.flatnonzero(forecast.sizes_S == size)
        gap = abs(forecast.mse_S[index] - measured.mse_S[s])
        large = gap > UNRELIABLE_SHARE * measured.mse_S[s]
        significant = gap > UNRELIABLE_ERRORS * measured.error_S[s]
        verdicts.append(not (large and significant))
    return verdicts


def samples_for_mse(forecast: Forecast, target: float) -> float | None:
    """Returns the n at which the curve reaches `target`, linear in log n between sizes, or None."""
    log_n_S, mse_S = np.log(forecast.sizes_S), forecast.mse_S
    if mse_S[0] <= target:
        return float(forecast.sizes_S[0])
    for s in range(1, len(mse_S)):
        if mse_S[s] <= target < mse_S[s - 1]:
            share = (mse_S[s - 1] - target) / (mse_S[s - 1] - mse_S[s])
            return float(np.exp(log_n_S[s - 1] + share * (log_n_S[s] - log_n_S[s - 1])))
    return None


def crossing(one: Forecast, other: Forecast) -> float | None:
    """Returns the first n at which two curves cross, or None if they do not cross.

    Raises:
        ValueError: the curves are over different sizes.
    """
    if not np.array_equal(one.sizes_S, other.sizes_S):
        raise ValueError(
            f"expected curves over the same sizes, got {one.sizes_S} and {other.sizes_S}"
        )
    gap_S, log_n_S = one.mse_S - other.mse_S, np.log(one.sizes_S)
    unequal = np.flatnonzero(gap_S)  # if curves are equal at a size, the signs around it decide
    for before, after in pairwise(unequal):
        if gap_S[before] * gap_S[after] < 0:
            if after > before + 1:
                return float(one.sizes_S[before + 1])
            share = gap_S[before] / (gap_S[before] - gap_S[after])
            return float(np.exp(log_n_S[before] + share * (log_n_S[after] - log_n_S[before])))
    return None


def _check_inputs(
    pool_PK: Array,
    labelled_NK: Array,
    labels_N: NDArray[np.int64],
    num_classes: int,
    sizes: Sequence[int],
) -> None:
    width = pool_PK.shape[1]
    if labelled_NK.shape != (len(labels_N), width):
        raise ValueError(
            f"expected labelled features ({len(labels_N)}, {width}), got {labelled_NK.shape}"
        )
    if len(pool_PK) < POOL_PER_FEATURE * width or len(labels_N) < LABELS_PER_FEATURE * width:
        raise ConfigError(
            f"{width} features need {POOL_PER_FEATURE * width} unlabelled and "
            f"{LABELS_PER_FEATURE * width} labelled items, got {len(pool_PK)} and "
            f"{len(labels_N)}. Set `components` to "
            f"{max(1, min(len(pool_PK) // POOL_PER_FEATURE, len(labels_N) // LABELS_PER_FEATURE))}"
            " or fewer to use leading principal components"
        )
    if list(sizes) != sorted({n for n in sizes if n >= 1}) or not len(sizes):
        raise ConfigError(f"expected ascending sizes >= 1, got {list(sizes)}")
    present = np.unique(labels_N).tolist()
    if num_classes < 2 or present != list(range(num_classes)):
        raise ConfigError(
            f"expected at least two classes, and labelled items of exactly the classes 0 to "
            f"{num_classes - 1}; got {present}"
        )
    if not (np.isfinite(pool_PK).all() and np.isfinite(labelled_NK).all()):
        raise NumericsError("a feature is NaN or infinite; check the feature map and its inputs")
