"""Losses of the hub: the task, exploration of all experts, and the experts' own cross-entropies.

After Hub-Pathway (see the package); in nats, over the local micro-batch.

Shape suffixes: B = samples, M = experts, C = target classes.
"""

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from dist_tl.config import StrictModel


class HubLossConfig(StrictModel):
    """Weights of the terms in addition to the task's cross-entropy."""

    explore: float = Field(
        default=0.3,
        ge=0,
        description="Weight of the divergence of the mean usage from a uniform one.",
    )
    exploit: float = Field(
        default=0.1, ge=0, description="Weight of the active experts' own cross-entropies."
    )


def exploration_loss(p_BM: Tensor) -> Tensor:
    """Returns KL(mean usage || uniform): 0 for uniform usage, log M for a single used expert.

    The mean usage is local; the mean over ranks is an upper bound for the global usage.
    """
    mean_M = p_BM.float().mean(dim=0)
    return torch.special.xlogy(mean_M, mean_M).sum() + math.log(p_BM.shape[1])


def exploitation_loss(logits_BMC: Tensor, active_BM: Tensor, labels_B: Tensor) -> Tensor:
    """Returns the mean over experts of the cross-entropy on their own samples (0 without any)."""
    B, M, C = logits_BMC.shape
    loss_BM = functional.cross_entropy(
        logits_BMC.float().reshape(B * M, C), labels_B.repeat_interleave(M), reduction="none"
    ).reshape(B, M)
    # Not a product: logits of inactive experts may be NaN and must not matter.
    total_M = torch.where(active_BM, loss_BM, 0.0).sum(dim=0)
    return (total_M / active_BM.sum(dim=0).clamp_min(1)).mean()


def hub_loss(
    logits_BC: Tensor,
    expert_logits_BMC: Tensor,
    active_BM: Tensor,
    p_BM: Tensor,
    labels_B: Tensor,
    config: HubLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the total loss and its detached terms, float32 scalars."""
    task = functional.cross_entropy(logits_BC.float(), labels_B)
    explore = exploration_loss(p_BM)
    exploit = exploitation_loss(expert_logits_BMC, active_BM, labels_B)
    loss = task + config.explore * explore + config.exploit * exploit
    parts = {"task": task, "explore": explore, "exploit": exploit}
    return loss, {name: part.detach() for name, part in parts.items()}
