"""Quality of pseudo samples: agreement with their class, and distance to real images.

Not covered: the features. Distances are comparable only within one feature network; published FID
values use Inception features instead.

Source of the Frechet distance: Dowson, Landau, J. Multivariate Analysis 12 (1982) 450;
Heusel et al., arXiv:1706.08500, for its use on images.

Shape suffixes: S = samples, K = source classes, D = features.
"""

import torch
from torch import Tensor


def agreement(logits_SK: Tensor, requested_S: Tensor) -> float:
    """Returns the share of samples that the source classifier assigns to their requested class.

    Raises:
        ValueError: no samples, or shapes that do not match.
    """
    if logits_SK.ndim != 2 or requested_S.shape != logits_SK.shape[:1] or len(requested_S) == 0:
        raise ValueError(
            f"expected logits (S >= 1, K) and labels (S,), got {tuple(logits_SK.shape)} and "
            f"{tuple(requested_S.shape)}"
        )
    correct_S = logits_SK.argmax(dim=1) == requested_S.to(logits_SK.device)
    return correct_S.double().mean().item()


def feature_moments(features_SD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean (D,) and unbiased covariance (D, D) of features, float64 on the CPU.

    For S <= D the covariance is singular; the Frechet distance still exists. It is biased upwards
    for every finite S, more so for small S: compare equal numbers of samples only.

    Raises:
        ValueError: not (S >= 2, D).
    """
    if features_SD.ndim != 2 or len(features_SD) < 2:
        raise ValueError(f"expected features (S >= 2, D), got {tuple(features_SD.shape)}")
    features_SD = features_SD.detach().cpu().double()
    mean_D = features_SD.mean(dim=0)
    centred_SD = features_SD - mean_D
    return mean_D, centred_SD.T @ centred_SD / (len(features_SD) - 1)


def frechet_distance(mean1_D: Tensor, cov1_DD: Tensor, mean2_D: Tensor, cov2_DD: Tensor) -> float:
    """Returns the squared Frechet (2-Wasserstein) distance of two Gaussians.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2); never below zero.

    Args:
        cov1_DD, cov2_DD: symmetric, positive semi-definite.

    Raises:
        ValueError: shapes that do not match, or values that are not finite.
    """
    dim = len(mean1_D)
    expected = [(dim,), (dim, dim), (dim,), (dim, dim)]
    moments = [t.detach().cpu().double() for t in (mean1_D, cov1_DD, mean2_D, cov2_DD)]
    if [tuple(t.shape) for t in moments] != expected:
        got = [tuple(t.shape) for t in moments]
        raise ValueError(f"expected means (D,) and covariances (D, D), got {got}")
    if not all(bool(t.isfinite().all()) for t in moments):
        raise ValueError("expected finite moments, got NaN or infinity")
    mean1_D, cov1_DD, mean2_D, cov2_DD = moments
    # Eigenvalues of the symmetric product are real; a general matrix root may be complex.
    root_DD = _symmetric_root(cov1_DD)
    eigenvalue_D = torch.linalg.eigvalsh(root_DD @ cov2_DD @ root_DD)
    cross = eigenvalue_D.clamp_min(0.0).sqrt().sum()
    squared = (mean1_D - mean2_D).square().sum()
    return max(0.0, (squared + cov1_DD.trace() + cov2_DD.trace() - 2.0 * cross).item())


def _symmetric_root(matrix_DD: Tensor) -> Tensor:
    eigenvalue_D, vector_DD = torch.linalg.eigh(matrix_DD)
    return (vector_DD * eigenvalue_D.clamp_min(0.0).sqrt()) @ vector_DD.T
