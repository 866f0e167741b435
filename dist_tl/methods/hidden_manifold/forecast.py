"""How much labelled target data would a feature map need? A forecast from second moments.

Ridge regression has a theory without a teacher: the covariance of the features, from unlabelled
data, and their correlation with the labels, from a few labelled ones, give the mean squared error
for any number of labels. Noise in that correlation would pass for signal; it is taken out.

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
    """Mean squared error over sizes, each at its best penalty.

    Attributes:
        sizes_S: numbers of labelled samples.
        mse_S: of one-vs-rest labels -1 and +1 (their mean taken off), averaged over classes.
        lam_S: the best penalty.
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
        mse_S, error_S: mean over draws, and its standard error.
        accuracy_S: share of held-out items of which the right class scores highest.
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
        """Features (N, F) to (N, K)."""
        return (np.asarray(features_NF, float) - self.mean_F) @ self.directions_FK


def principal_components(pool_PF: Array, count: int) -> Components:
    """The `count` directions of largest variance in the pool.

    Scaled by sqrt(count / F), so that penalties mean the same as for all F features.

    Raises:
        ConfigError: more components than features or than pool items.
    """
    pool_PF = np.asarray(pool_PF, float)
    if not 1 <= count <= min(pool_PF.shape):
        raise ConfigError(
            f"components: expected 1 to {min(pool_PF.shape)} (the features, or the pool's items), "
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
    """What ridge on these features would come to with n labels.

    Args:
        pool_PK: features of unlabelled items, P >= 10 K.
        labelled_NK: features of labelled items, N >= 5 K.
        num_bootstrap: samples of the labelled items for the band; 0 leaves it at the curve itself.

    Raises:
        ConfigError: too few items for so many features, n < 1, or fewer than two classes.
        NumericsError: a feature is not finite, or none varies.
        NotConvergedError: the theory has no solution at some n and penalty.
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
        raise NumericsError("no feature varies over the pool; choose another feature map")
    rotated_NK = (labelled_NK - mean_K) @ basis_KK
    law = _Law(np.maximum(omega_K, 0.0), tuple(sizes), tuple(lams), num_classes)
    mse_SL = law.errors(rotated_NK, labels_N)
    best_S = mse_SL.argmin(axis=1)
    rows_S = np.arange(len(sizes))
    low_S = high_S = mse_SL[rows_S, best_S]
    if num_bootstrap:
        if rng is None:
            raise ValueError("expected rng, the generator that a bootstrap draws from, got None")
        draws_RS = np.array(
            [law.resampled(rotated_NK, labels_N, rng) for _ in range(num_bootstrap)]
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
class _Law:
    """The pool's spectrum, and what is asked of it."""

    omega_K: Array
    sizes: tuple[int, ...]
    lams: tuple[float, ...]
    num_classes: int

    def errors(self, rotated_NK: Array, labels_N: NDArray[np.int64]) -> Array:
        """Mean squared errors (S, L), averaged over classes."""
        return self._table(self._terms(rotated_NK, labels_N))

    def _terms(self, rotated_NK: Array, labels_N: NDArray[np.int64]) -> tuple[Array, float]:
        # The error is linear in both terms, so their mean over classes gives the mean error.
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
        """Best errors (S,) of one bootstrap sample of the labelled items."""
        rows_N = rng.integers(len(labels_N), size=len(labels_N))
        t_K, rho = self._terms(rotated_NK[rows_N], labels_N[rows_N])
        # Drawing again adds the labels' noise once more, which the correction does not see: the
        # drawn terms scatter around the uncorrected ones. That known distance is taken off.
        classes = range(self.num_classes)
        excess_CK = [
            plain_terms(rotated_NK, one_vs_rest(labels_N, c))
            - teacher_terms(rotated_NK, one_vs_rest(labels_N, c))[0]
            for c in classes
        ]
        return self._table((t_K - np.mean(excess_CK, axis=0), rho)).min(axis=1)

    def _mse(self, t_K: Array, rho: float, size: int, lam: float) -> float:
        alpha = size / len(self.omega_K)
        found = solve_real_data(self.omega_K, t_K, rho, alpha=alpha, lam=lam)
        assert found.test_mse is not None, "ridge has a squared error"
        return found.test_mse


def one_vs_rest(labels_N: NDArray[np.int64], wanted: int) -> Array:
    """Labels -1 and +1 with their mean taken off, float64."""
    y_N = np.where(labels_N == wanted, 1.0, -1.0)
    return y_N - y_N.mean()


def plain_terms(rotated_NK: Array, y_N: Array) -> Array:
    """mean(y z_i)^2: the overlaps with the labels' noise still in them."""
    return (y_N[:, None] * rotated_NK).mean(axis=0) ** 2


def teacher_terms(rotated_NK: Array, y_N: Array) -> tuple[Array, float]:
    """Squared overlaps t_i of labels and features, without the noise of few labels, and rho.

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
    """Ridge fitted on n random labelled items, tested on all others.

    Args:
        lams: the penalty of each size, as forecast.

    Raises:
        ConfigError: a size that leaves nothing to test on.
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
    mse, right = np.zeros((len(sizes), draws)), np.zeros((len(sizes), draws))
    for draw in range(draws):
        order_N = rng.permutation(len(labels_N))
        for s, (size, lam) in enumerate(zip(sizes, lams, strict=True)):
            kept, rest = order_N[:size], order_N[size:]
            mse[s, draw], right[s, draw] = _held_out(
                features_NK, labels_N, kept, rest, num_classes, lam
            )
    return Measured(
        sizes_S=np.asarray(sizes, np.int64),
        mse_S=mse.mean(axis=1),
        error_S=mse.std(axis=1, ddof=1) / math.sqrt(draws) if draws > 1 else np.full(len(mse), 0.0),
        accuracy_S=right.mean(axis=1),
    )


def _held_out(
    features_NK: Array,
    labels_N: NDArray[np.int64],
    kept: NDArray[np.int64],
    rest: NDArray[np.int64],
    num_classes: int,
    lam: float,
) -> tuple[float, float]:
    """Mean squared error over classes, and accuracy, on the items left out."""
    target_NC = np.where(labels_N[:, None] == np.arange(num_classes), 1.0, -1.0)
    offset_C = target_NC.mean(axis=0)  # of the whole labelled set, as the forecast has it
    scale = math.sqrt(features_NK.shape[1])
    a_nK = features_NK[kept] / scale
    gram_KK = a_nK.T @ a_nK + lam * np.eye(a_nK.shape[1])
    w_KC = np.linalg.solve(gram_KK, a_nK.T @ (target_NC[kept] - offset_C))
    z_MC = features_NK[rest] / scale @ w_KC
    mse = float(np.mean((target_NC[rest] - offset_C - z_MC) ** 2))
    return mse, float(np.mean((z_MC + offset_C).argmax(axis=1) == labels_N[rest]))


def is_reliable(forecast: Forecast, measured: Measured) -> list[bool]:
    """For every measured size: whether forecast and measurement agree.

    They do not if their gap is above 10 % of the error and above 3 standard errors.
    """
    verdicts = []
    for s, size in enumerate(measured.sizes_S):
        [place] = np.flatnonzero(forecast.sizes_S == size)
        gap = abs(forecast.mse_S[place] - measured.mse_S[s])
        large = gap > UNRELIABLE_SHARE * measured.mse_S[s]
        clear = gap > UNRELIABLE_ERRORS * measured.error_S[s]
        verdicts.append(not (large and clear))
    return verdicts


def samples_for_mse(forecast: Forecast, target: float) -> float | None:
    """The n at which the curve comes down to `target`, in log n between sizes; or None."""
    log_n_S, mse_S = np.log(forecast.sizes_S), forecast.mse_S
    if mse_S[0] <= target:
        return float(forecast.sizes_S[0])
    for s in range(1, len(mse_S)):
        if mse_S[s] <= target < mse_S[s - 1]:
            share = (mse_S[s - 1] - target) / (mse_S[s - 1] - mse_S[s])
            return float(np.exp(log_n_S[s - 1] + share * (log_n_S[s] - log_n_S[s - 1])))
    return None


def crossing(one: Forecast, other: Forecast) -> float | None:
    """The first n at which two curves cross; None if they do not, or only touch.

    Raises:
        ValueError: the curves are over different sizes.
    """
    if not np.array_equal(one.sizes_S, other.sizes_S):
        raise ValueError(
            f"expected curves over the same sizes, got {one.sizes_S} and {other.sizes_S}"
        )
    gap_S, log_n_S = one.mse_S - other.mse_S, np.log(one.sizes_S)
    apart = np.flatnonzero(gap_S)  # where curves meet at a size, the signs around it decide
    for before, after in pairwise(apart):
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
            f"{LABELS_PER_FEATURE * width} labelled items; there are {len(pool_PK)} and "
            f"{len(labels_N)}. Set `components` to "
            f"{max(1, min(len(pool_PK) // POOL_PER_FEATURE, len(labels_N) // LABELS_PER_FEATURE))}"
            " or fewer, to use that many leading principal components"
        )
    if list(sizes) != sorted({n for n in sizes if n >= 1}) or not len(sizes):
        raise ConfigError(f"expected ascending sizes of 1 or more, got {list(sizes)}")
    seen = np.unique(labels_N).tolist()
    if num_classes < 2 or seen != list(range(num_classes)):
        raise ConfigError(
            f"expected two classes or more, and a labelled item of every class 0 to "
            f"{num_classes - 1} and of no other; got {seen}"
        )
    if not (np.isfinite(pool_PK).all() and np.isfinite(labelled_NK).all()):
        raise NumericsError("a feature is NaN or infinite; check the feature map and its inputs")
