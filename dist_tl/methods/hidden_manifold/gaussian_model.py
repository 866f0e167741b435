"""The Gaussian covariate model of a task and a feature map.

The theory replaces latents c and features v = sigma(W x / sqrt(D)) by Gaussians with the same
second moments. These are computed (a) from samples, for any W, or in closed form (b) for random W
and (c) for erf units. Chunk i of the samples depends on (seed, purpose, i) only, so that any worker
can draw it, and the merged sums do not depend on the number of workers.

After Gerace et al., arXiv:2106.05418, and Loureiro et al., arXiv:2102.08127.

Shape suffixes: N = samples, D = inputs, d = latents, K = features, B = bins.
"""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from dist_tl.methods.hidden_manifold.activations import (
    ODD,
    Activation,
    apply,
    gaussian_coefficients,
)
from dist_tl.methods.hidden_manifold.moments import (
    BinMoments,
    BinSums,
    Covariances,
    MomentSums,
    Sums,
    symmetric,
)
from dist_tl.methods.hidden_manifold.sampling import Task, sample_chunk
from dist_tl.seeds import torch_rng

CHUNK = 8192

Part = TypeVar("Part", bound=Sums)


def random_features(inputs: int, hidden: int, *, rng: torch.Generator) -> Tensor:
    """Draws an untrained feature map: W (K, D) float64, iid N(0, 1)."""
    return torch.randn(hidden, inputs, generator=rng, dtype=torch.float64)


def hidden_features(weights_KD: Tensor, x_ND: Tensor, activation: Activation) -> Tensor:
    """Computes v = sigma(W x / sqrt(D)), (N, K) float64.

    Raises:
        ValueError: W and x have different numbers of inputs.
    """
    if weights_KD.ndim != 2 or x_ND.ndim != 2 or weights_KD.shape[1] != x_ND.shape[1]:
        raise ValueError(
            f"expected W (K, D) and x (N, D), got {tuple(weights_KD.shape)}, {tuple(x_ND.shape)}"
        )
    scale = 1.0 / math.sqrt(max(1, x_ND.shape[1]))
    return apply(activation, x_ND.double() @ (weights_KD.double() * scale).T)


def chunk_moments(
    task: Task, weights_KD: Tensor, activation: Activation, num: int, *, rng: torch.Generator
) -> MomentSums:
    """Computes the moment sums of one chunk of `num` samples, a part of `monte_carlo`."""
    x_ND, y_N, c_Nd = sample_chunk(task, num, rng=rng)
    sums = MomentSums.zeros(latent=task.latent, hidden=len(weights_KD))
    sums.add(hidden_features(weights_KD, x_ND, activation), c_Nd, y_N)
    return sums


def monte_carlo(
    task: Task,
    weights_KD: Tensor,
    activation: Activation,
    *,
    num_samples: int,
    chunk: int = CHUNK,
    seed: int,
    purpose: str,
) -> MomentSums:
    """Route (a): computes the moment sums of `num_samples` samples, one chunk at a time.

    Bit-identical to merging, in order of i, the `chunk_moments` of chunks i = 0, 1, ... of `chunk`
    samples each (the last has the remainder) drawn from torch_rng(seed, purpose, i).

    Raises:
        ValueError: no samples, or an empty chunk.
    """

    def sum_chunk(num: int, rng: torch.Generator) -> MomentSums:
        return chunk_moments(task, weights_KD, activation, num, rng=rng)

    return _streamed(sum_chunk, num_samples, chunk, seed, purpose)


def chunk_bins(
    task: Task,
    weights_KD: Tensor,
    activation: Activation,
    num: int,
    *,
    num_bins: int = 8,
    rng: torch.Generator,
) -> BinSums:
    """Computes the bin sums of one chunk of `num` samples, a part of `binned_moments`.

    Raises:
        ValueError: no bins, or an activation is not odd: v given y = -1 is then not distributed
            like -v given y = +1.
    """
    if not {activation, task.input_activation} <= ODD:
        raise ValueError(
            f"expected odd activations, got {task.input_activation} inputs and {activation} "
            "features: the mixture theory needs odd activations"
        )
    x_ND, y_N, c_Nd = sample_chunk(task, num, rng=rng)
    yv_NK = y_N[:, None] * hidden_features(weights_KD, x_ND, activation)
    field_N = (c_Nd @ task.teacher_d).abs() / task.teacher_d.norm()
    bin_N = torch.bucketize(field_N, _half_normal_edges(num_bins), right=True)
    parts = [yv_NK[bin_N == b] for b in range(num_bins)]
    return BinSums(
        count_B=torch.tensor([len(part) for part in parts]),
        sum_BK=torch.stack([part.sum(dim=0) for part in parts]),
        sum_BKK=torch.stack([part.T @ part for part in parts]),
    )


def binned_moments(
    task: Task,
    weights_KD: Tensor,
    activation: Activation,
    *,
    num_samples: int,
    num_bins: int = 8,
    chunk: int = CHUNK,
    seed: int,
    purpose: str,
) -> BinMoments:
    """Computes the moments of y v in equally likely bins of |theta . c| / |theta|.

    Chunks as in `monte_carlo`; merging the sums of `chunk_bins` is bit-identical.

    Raises:
        ValueError: no samples, an empty chunk, no bins, or an activation is not odd.
        NumericsError: a bin has fewer than two samples.
    """

    def sum_chunk(num: int, rng: torch.Generator) -> BinSums:
        return chunk_bins(task, weights_KD, activation, num, num_bins=num_bins, rng=rng)

    return _streamed(sum_chunk, num_samples, chunk, seed, purpose).moments()


def random_feature_covariances(
    task: Task, weights_KD: Tensor, activation: Activation
) -> Covariances:
    """Route (b): returns the covariances for W iid N(0, 1), exact in the limit of large sizes.

    For an activation that is not odd they are those of centred features.

    Raises:
        ValueError: the task's inputs have a mean, or W does not fit them.
    """
    c_KK, overlap_dK, k1x = _pre_activations(task, weights_KD)
    _, k1, kstar = gaussian_coefficients(activation, float(c_KK.diagonal().mean()))
    omega_KK = k1**2 * c_KK + kstar**2 * torch.eye(len(c_KK), dtype=torch.float64)
    return Covariances(_identity(task), k1 * k1x * overlap_dK, omega_KK)


def erf_covariances(task: Task, weights_KD: Tensor) -> Covariances:
    """Route (c): returns the covariances of erf units for any W, for Gaussian pre-activations.

    Raises:
        ValueError: the task's inputs have a mean, or W does not fit them.
    """
    c_KK, overlap_dK, k1x = _pre_activations(task, weights_KD)
    s_K = 1 + 2 * c_KK.diagonal()
    omega_KK = (2 / math.pi) * torch.asin(2 * c_KK / torch.outer(s_K, s_K).sqrt())
    return Covariances(_identity(task), k1x * overlap_dK * 2 / (math.pi * s_K).sqrt(), omega_KK)


def _pre_activations(task: Task, weights_KD: Tensor) -> tuple[Tensor, Tensor, float]:
    """Returns W Omega_x W^T / D (K, K), F W^T / sqrt(d D) (d, K), and k1 of the inputs."""
    if task.input_activation not in ODD:
        raise ValueError(
            f"the analytic routes need inputs of mean 0; got {task.input_activation} inputs: use "
            "monte_carlo"
        )
    if weights_KD.ndim != 2 or weights_KD.shape[1] != task.inputs:
        raise ValueError(f"expected W (K, {task.inputs}), got {tuple(weights_KD.shape)}")
    w_KD = weights_KD.double() / math.sqrt(task.inputs)
    _, k1x, kstarx = gaussian_coefficients(task.input_activation, 1.0)
    overlap_dK = task.features_dD @ w_KD.T / math.sqrt(task.latent)
    c_KK = k1x**2 * overlap_dK.T @ overlap_dK + kstarx**2 * w_KD @ w_KD.T
    return symmetric(c_KK), overlap_dK, k1x


def _streamed(
    sum_chunk: Callable[[int, torch.Generator], Part],
    num_samples: int,
    chunk: int,
    seed: int,
    purpose: str,
) -> Part:
    """Returns the merged sums of all chunks, with two of them in memory at a time."""
    if num_samples < 1 or chunk < 1:
        raise ValueError(f"expected num_samples and chunk >= 1, got {num_samples} and {chunk}")
    parts = (
        sum_chunk(min(chunk, num_samples - first), torch_rng(seed, purpose, i))
        for i, first in enumerate(range(0, num_samples, chunk))
    )
    return functools.reduce(lambda total, part: type(part).merge([total, part]), parts)


def _half_normal_edges(num_bins: int) -> Tensor:
    """Returns the num_bins - 1 inner edges of equally likely bins of |g|, g ~ N(0, 1)."""
    if num_bins < 1:
        raise ValueError(f"expected num_bins >= 1, got {num_bins}")
    share = torch.arange(1, num_bins, dtype=torch.float64) / num_bins
    return torch.special.ndtri(0.5 + 0.5 * share)


def _identity(task: Task) -> Tensor:
    return torch.eye(task.latent, dtype=torch.float64)
