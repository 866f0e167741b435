"""Content (generalised volume) of simplices, from pairwise distances only.

Two equivalent methods: the Cayley-Menger determinant, and the Gram matrix of the edges at one
vertex. Labels use neither (`item_labels.py` only needs heights); they are the reference for tests
of the fast method.

Source: Kender et al., arXiv:2207.03554; formulas as in the notes, section "Geometry".

Shape suffixes: B = simplices in the batch, M = vertices of one, N = M - 1 its dimension.
"""

import math

import torch
from torch import Tensor

from dist_tl.errors import NotEuclideanError

NEGATIVE = (
    1e-10  # relative to the largest eigenvalue: below -NEGATIVE, no points have the distances
)


def log_content(sq_dist_BMM: Tensor) -> Tensor:
    """Returns the natural logarithm of each simplex's content, by the Gram matrix of edges.

    Args:
        sq_dist_BMM: squared Euclidean distances, float64, symmetric, zero on the diagonal.

    Returns:
        (B,) float64; -inf if the vertices lie in a flat of fewer than N dimensions. A single
        vertex has content 1.

    Raises:
        ValueError: another shape or dtype.
        NotEuclideanError: no points have these distances.
    """
    _check(sq_dist_BMM)
    eigenvalue_BN = torch.linalg.eigvalsh(_edge_gram(sq_dist_BMM))
    if eigenvalue_BN.shape[1] == 0:
        return sq_dist_BMM.new_zeros(len(sq_dist_BMM))
    scale_B = eigenvalue_BN.abs().amax(dim=1)
    if bool((eigenvalue_BN[:, 0] < -NEGATIVE * scale_B).any()):
        raise NotEuclideanError(
            "no points have these distances (a squared length would be "
            f"{float(eigenvalue_BN.min()):.3g}); expected Euclidean distances: use features and "
            "squared differences, or Hellinger or root Jensen-Shannon distances"
        )
    flat_B = eigenvalue_BN[:, 0] <= NEGATIVE * scale_B
    log_det_B = eigenvalue_BN.clamp_min(1e-300).log().sum(dim=1)
    log_content_B = 0.5 * log_det_B - math.lgamma(sq_dist_BMM.shape[1])
    return log_content_B.masked_fill(flat_B, -math.inf)


def cayley_menger_log_content(sq_dist_BMM: Tensor) -> Tensor:
    """Returns the log content by the Cayley-Menger determinant; exact zeros become noise.

    V_k^2 = (-1)^(k+1) det B_k / (2^k (k!)^2), in logs, because the factor overflows from k = 92.

    Raises:
        ValueError: another shape or dtype.
        NotEuclideanError: the determinant has the wrong sign.
    """
    _check(sq_dist_BMM)
    count, size, _ = sq_dist_BMM.shape
    bordered = sq_dist_BMM.new_ones(count, size + 1, size + 1)
    bordered[:, 0, 0] = 0.0
    bordered[:, 1:, 1:] = sq_dist_BMM
    sign_B, log_det_B = torch.linalg.slogdet(bordered)
    k = size - 1
    if bool((sign_B * (-1.0) ** (k + 1) < 0).any()):
        raise NotEuclideanError(
            "the Cayley-Menger determinant has the wrong sign: no points have these distances, or "
            "the simplex is flat up to rounding"
        )
    return 0.5 * (log_det_B - k * math.log(2.0)) - math.lgamma(k + 1)


def squared_heights(sq_dist_BMM: Tensor) -> Tensor:
    """Returns squared heights (B, N) of vertex j over the flat of vertices 0 to j - 1, j = 1..N.

    They are the pivots of the Gram matrix of the edges at vertex 0.

    Raises:
        ValueError: another shape or dtype.
        NotEuclideanError: no points have these distances.
    """
    _check(sq_dist_BMM)
    left_BNN, heights = _edge_gram(sq_dist_BMM), []
    for j in range(left_BNN.shape[1]):
        pivot_B = left_BNN[:, j, j]
        scale_B = sq_dist_BMM.amax(dim=(1, 2))
        if bool((pivot_B < -NEGATIVE * scale_B).any()):
            raise NotEuclideanError("a squared height is negative: no points have these distances")
        pivot_B = pivot_B.clamp_min(0.0)
        heights.append(pivot_B)
        column_BN = left_BNN[:, :, j] / pivot_B.clamp_min(1e-300).sqrt()[:, None]
        column_BN = torch.where((pivot_B > NEGATIVE * scale_B)[:, None], column_BN, 0.0)
        left_BNN = left_BNN - column_BN[:, :, None] * column_BN[:, None, :]
    return torch.stack(heights, dim=1) if heights else sq_dist_BMM.new_zeros(len(sq_dist_BMM), 0)


def _edge_gram(sq_dist_BMM: Tensor) -> Tensor:
    to_first_BN = sq_dist_BMM[:, 0, 1:]
    return 0.5 * (to_first_BN[:, :, None] + to_first_BN[:, None, :] - sq_dist_BMM[:, 1:, 1:])


def _check(sq_dist_BMM: Tensor) -> None:
    shape = tuple(sq_dist_BMM.shape)
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] < 1:
        raise ValueError(f"expected squared distances (B, M, M) with M >= 1, got {shape}")
    if sq_dist_BMM.dtype != torch.float64:
        raise ValueError(f"expected float64, got {sq_dist_BMM.dtype}")
