"""One (source, target) pair of the divergence forecast.

The notes on Kender et al., arXiv:2207.03554, section "Divergence forecast".

Shape suffixes: N, K = items of source and target, D = features.
"""

from dataclasses import dataclass

from torch import Tensor

from dist_tl.methods.geometry.divergence import (
    activation_distribution,
    js_divergence,
    kl_divergence,
)


@dataclass(frozen=True)
class Pair:
    """Divergences in nats and transfer error of one pair."""

    source: str
    target: str
    js: float
    kl_target_source: float
    kl_source_target: float
    error: float


def measured_pair(
    source: str, target: str, source_ND: Tensor, target_KD: Tensor, error: float
) -> Pair:
    """Returns a pair with the divergences between its mean activations.

    Raises:
        ValueError: a negative or non-finite feature, or all of them zero.
    """
    p_source_D, p_target_D = activation_distribution(source_ND), activation_distribution(target_KD)
    return Pair(
        source=source,
        target=target,
        js=js_divergence(p_target_D, p_source_D),
        kl_target_source=kl_divergence(p_target_D, p_source_D),
        kl_source_target=kl_divergence(p_source_D, p_target_D),
        error=error,
    )
