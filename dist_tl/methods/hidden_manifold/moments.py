"""Sums of moments over samples, and covariances computed from them.

Sums are float64 and add up chunk by chunk; merged in the order of the chunks they are bit-identical
on any number of workers. Trained features have a spike along the teacher and are far from Gaussian;
within the bins below they are almost Gaussian, as the mixture theory requires.

After Gerace et al., arXiv:2106.05418, and Loureiro et al., arXiv:2102.08127.

Shape suffixes: N = samples, d = latents, K = features, B = bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from dist_tl.errors import NumericsError

_PSD_TOLERANCE = 1e-10  # relative to the largest eigenvalue
_MEAN_TOLERANCE = 8.0  # standard errors; by chance the maximum over many features stays below 5


@dataclass(frozen=True, eq=False)
class Covariances:
    """Second moments of latents and features, float64.

    Raises:
        ValueError: the shapes do not fit together.
        NumericsError: a value is not finite, or omega has a negative eigenvalue.
    """

    psi_dd: Tensor  # E[c c^T]
    phi_dK: Tensor  # E[c v^T]
    omega_KK: Tensor  # E[v v^T]

    def __post_init__(self) -> None:
        latent, hidden = self.phi_dK.shape
        shapes = tuple(self.psi_dd.shape), tuple(self.omega_KK.shape)
        if shapes != ((latent, latent), (hidden, hidden)):
            raise ValueError(f"expected psi (d, d), phi (d, K), omega (K, K), got {shapes}")
        if not all(bool(m.isfinite().all()) for m in (self.psi_dd, self.phi_dK, self.omega_KK)):
            raise NumericsError("covariances contain NaN or infinity; check the weights W")
        eigenvalue_K = torch.linalg.eigvalsh(self.omega_KK)
        if float(eigenvalue_K[0]) < -_PSD_TOLERANCE * float(eigenvalue_K.abs().max()):
            raise NumericsError(
                f"omega has the eigenvalue {float(eigenvalue_K[0]):.3g}: expected a covariance "
                "(no negative eigenvalue); compute all entries from the same samples"
            )


@dataclass(eq=False)
class Sums:
    """Sums over samples; every field is additive."""

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """Returns the sums over all parts, added in the given order, which is that of the chunks.

        Raises:
            ValueError: no parts, or parts of different sizes.
        """
        if not parts:
            raise ValueError("expected at least one part to merge, got none")
        total = parts[0].copy()
        for part in parts[1:]:
            total.accumulate(part)
        return total

    def copy(self) -> Self:
        """Returns a copy that shares no memory."""
        values = (getattr(self, field.name) for field in fields(self))
        return type(self)(*(v.clone() if isinstance(v, Tensor) else v for v in values))

    def accumulate(self, other: Self) -> None:
        """Adds the sums of another part, in place.

        Raises:
            ValueError: the parts differ in their numbers of latents, features or bins.
        """
        for field in fields(self):
            own, added = getattr(self, field.name), getattr(other, field.name)
            if isinstance(own, Tensor) and own.shape != added.shape:
                raise ValueError(
                    f"{field.name}: expected parts of equal shape, got {tuple(own.shape)} and "
                    f"{tuple(added.shape)}"
                )
            setattr(self, field.name, own + added)


@dataclass(eq=False)
class MomentSums(Sums):
    """Sums of first and second moments of features, latents and labels; all tensors float64."""

    count: int
    count_labelled: int
    sum_y: float
    sum_yy: float
    sum_c_d: Tensor
    sum_v_K: Tensor
    sum_yv_K: Tensor
    sum_cc_dd: Tensor
    sum_cv_dK: Tensor
    sum_vv_KK: Tensor

    @classmethod
    def zeros(cls, *, latent: int, hidden: int) -> Self:
        """Returns empty sums for `latent` latents (0 for real data) and `hidden` features."""
        c, v = latent, hidden
        shapes = [(c,), (v,), (v,), (c, c), (c, v), (v, v)]
        return cls(0, 0, 0.0, 0.0, *(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, v_NK: Tensor, c_Nd: Tensor | None = None, y_N: Tensor | None = None) -> None:
        """Adds N samples.

        Args:
            v_NK: features, any float dtype; sums are float64.
            c_Nd: latents; None for real data.
            y_N: labels, -1 and +1 or any real numbers; None for unlabelled samples.

        Raises:
            ValueError: shapes that do not fit these sums.
        """
        v_NK = v_NK.double()
        c_Nd = v_NK.new_empty(len(v_NK), 0) if c_Nd is None else c_Nd.double()
        widths = (c_Nd.shape[1:], v_NK.shape[1:])
        if widths != (self.sum_c_d.shape, self.sum_v_K.shape) or len(c_Nd) != len(v_NK):
            raise ValueError(
                f"expected c (N, {len(self.sum_c_d)}) and v (N, {len(self.sum_v_K)}), got "
                f"{tuple(c_Nd.shape)} and {tuple(v_NK.shape)}"
            )
        self.count += len(v_NK)
        self.sum_c_d = self.sum_c_d + c_Nd.sum(dim=0)
        self.sum_v_K = self.sum_v_K + v_NK.sum(dim=0)
        self.sum_cc_dd = self.sum_cc_dd + c_Nd.T @ c_Nd
        self.sum_cv_dK = self.sum_cv_dK + c_Nd.T @ v_NK
        self.sum_vv_KK = self.sum_vv_KK + v_NK.T @ v_NK
        if y_N is not None:
            self._add_labels(v_NK, y_N.double())

    def covariances(self, *, centred: bool = False) -> Covariances:
        """Returns Psi, Phi and Omega; the theory is stable because all use the same samples.

        Args:
            centred: subtract the means of features and latents; the fit must then also subtract
                the features' mean.

        Raises:
            ValueError: no samples.
            NumericsError: features have a mean and `centred` is False; or see `Covariances`.
        """
        if self.count == 0:
            raise ValueError("expected at least one sample, got none")
        c_d, v_K = self.sum_c_d / self.count, self.sum_v_K / self.count
        if not centred:
            self._check_zero_mean(v_K)
            c_d, v_K = torch.zeros_like(c_d), torch.zeros_like(v_K)
        return Covariances(
            psi_dd=symmetric(self.sum_cc_dd / self.count - torch.outer(c_d, c_d)),
            phi_dK=self.sum_cv_dK / self.count - torch.outer(c_d, v_K),
            omega_KK=symmetric(self.sum_vv_KK / self.count - torch.outer(v_K, v_K)),
        )

    def label_moments(self, *, centred: bool = False) -> tuple[float, Tensor]:
        """Returns rho = E[y^2] and phi = E[y v], float64 (K,), for data without a teacher.

        Raises:
            ValueError: no samples, or samples without labels.
        """
        if self.count == 0 or self.count_labelled != self.count:
            raise ValueError(
                f"expected a label for every sample, got {self.count_labelled} of {self.count}"
            )
        mean_y = self.sum_y / self.count if centred else 0.0
        rho = self.sum_yy / self.count - mean_y**2
        return rho, (self.sum_yv_K - mean_y * self.sum_v_K) / self.count

    def _add_labels(self, v_NK: Tensor, y_N: Tensor) -> None:
        if y_N.shape != v_NK.shape[:1]:
            raise ValueError(f"expected labels ({len(v_NK)},), got {tuple(y_N.shape)}")
        self.count_labelled += len(y_N)
        self.sum_y += float(y_N.sum())
        self.sum_yy += float(y_N.square().sum())
        self.sum_yv_K = self.sum_yv_K + y_N @ v_NK

    def _check_zero_mean(self, mean_K: Tensor) -> None:
        # The second moment, not the variance, so that a few samples never exceed the tolerance.
        error_K = (self.sum_vv_KK.diagonal() / self.count**2).sqrt()
        excess_K = mean_K.abs() - _MEAN_TOLERANCE * error_K
        if bool((excess_K > 0).any()):
            k = int(excess_K.argmax())
            raise NumericsError(
                f"feature {k} has mean {float(mean_K[k]):.3g}, more than {_MEAN_TOLERANCE:.0f} "
                "standard errors from 0, but the theory assumes 0: use centred=True and subtract "
                "the features' mean in the fit"
            )


@dataclass(frozen=True, eq=False)
class BinMoments:
    """Share, mean and covariance of y v in bins of the teacher's field, float64."""

    p_B: Tensor
    mu_BK: Tensor
    cov_BKK: Tensor


@dataclass(eq=False)
class BinSums(Sums):
    """Sums of y v within each bin of |theta . c| / |theta|."""

    count_B: Tensor  # int64
    sum_BK: Tensor
    sum_BKK: Tensor

    def moments(self) -> BinMoments:
        """Returns share, mean and covariance of every bin.

        Raises:
            NumericsError: a bin has fewer than two samples.
        """
        if int(self.count_B.min()) < 2:
            raise NumericsError(
                f"bins have {self.count_B.tolist()} samples; expected at least 2 in each: take "
                "more samples or fewer bins"
            )
        mu_BK = self.sum_BK / self.count_B[:, None]
        second_BKK = self.sum_BKK / self.count_B[:, None, None]
        return BinMoments(
            p_B=self.count_B.double() / self.count_B.sum(),
            mu_BK=mu_BK,
            cov_BKK=symmetric(second_BKK - mu_BK[:, :, None] * mu_BK[:, None, :]),
        )


def symmetric(square: Tensor) -> Tensor:
    """Returns the symmetric part of a square matrix or of a batch of them."""
    # A product A^T A may differ from its transpose in the last bit.
    return 0.5 * (square + square.mT)
