"""A forecast as records, one for each training set size, and its checks against measurements.

Shape suffixes: N = labelled items, K = features, S = sizes n.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dist_tl.config import StrictModel
from dist_tl.methods.hidden_manifold.forecast import Array, Forecast, held_out_curve, is_reliable


class CurvePoint(StrictModel):
    """The forecast at one training set size."""

    samples: int
    mse: float
    lam: float = Field(description="Best L2 penalty.")
    low: float = Field(description="Lower end of the 95 % bootstrap band.")
    high: float = Field(description="Upper end of the 95 % bootstrap band.")


class Check(StrictModel):
    """Forecast and measured error at one training set size."""

    samples: int
    forecast: float
    mse: float = Field(description="Measured error.")
    error: float = Field(description="Standard error of `mse`.")
    accuracy: float
    agrees: bool = Field(description="Whether the forecast is within 10 % or 3 standard errors.")

    @property
    def gap(self) -> float:
        """Relative error of the forecast."""
        return self.forecast / self.mse - 1


def points_of(curve: Forecast) -> tuple[CurvePoint, ...]:
    """Returns the curve as records."""
    columns = (curve.sizes_S, curve.mse_S, curve.lam_S, curve.low_S, curve.high_S)
    return tuple(
        CurvePoint(samples=n, mse=mse, lam=lam, low=low, high=high)
        for n, mse, lam, low, high in zip(*(c.tolist() for c in columns), strict=True)
    )


def curve_of(points: Sequence[CurvePoint]) -> Forecast:
    """Returns the curve of some records."""
    rows = ((p.samples, p.mse, p.lam, p.low, p.high) for p in points)
    return Forecast(*map(np.array, zip(*rows, strict=True)))


def check_curve(
    curve: Forecast,
    features_NK: Array,
    labels_N: NDArray[np.int64],
    *,
    num_classes: int,
    sizes: Sequence[int],
    draws: int,
    rng: np.random.Generator,
) -> tuple[Check, ...]:
    """Measures some sizes of the curve on held-out items, each at its forecast penalty.

    Raises:
        ConfigError: a size leaves no item for testing.
    """
    if not sizes:
        return ()
    indices = np.searchsorted(curve.sizes_S, sizes)
    measured = held_out_curve(
        features_NK,
        labels_N,
        num_classes=num_classes,
        sizes=sizes,
        lams=curve.lam_S[indices].tolist(),
        draws=draws,
        rng=rng,
    )
    columns = (curve.mse_S[indices], measured.mse_S, measured.error_S, measured.accuracy_S)
    agreeing = is_reliable(curve, measured)
    return tuple(
        Check(samples=n, forecast=forecast, mse=mse, error=error, accuracy=acc, agrees=agrees)
        for n, forecast, mse, error, acc, agrees in zip(
            sizes, *(c.tolist() for c in columns), agreeing, strict=True
        )
    )
