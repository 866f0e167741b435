"""What the hub learns from: the task, exploration of all experts, and the experts' own fit.

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
    """Weights of the terms beside the task's cross-entropy."""

    explore: float = Field(
        default=0.3, ge=0, description="Of the divergence of the mean usage from an even one."
    )
    exploit: float = Field(
        default=0.1, ge=0, description="Of the active experts' own cross-entropies."
    )


def exploration_loss(p_BM: Tensor) -> Tensor:
    """KL(mean usage || uniform): 0 at even usage, log M where one expert gets everything.

    Local means: the mean of these over ranks bounds that of the global usage from above.
    """
    mean_M = p_BM.float().mean(dim=0)
    return torch.special.xlogy(mean_M, mean_M).sum() + math.log(p_BM.shape[1])


def exploitation_loss(logits_BMC: Tensor, active_BM: Tensor, labels_B: Tensor) -> Tensor:
    """Mean over experts of the cross-entropy on the samples that chose them; without any, 0."""
    B, M, C = logits_BMC.shape
    loss_BM = functional.cross_entropy(
        logits_BMC.float().reshape(B * M, C), labels_B.repeat_interleave(M), reduction="none"
    ).reshape(B, M)
    # Not a product: what an inactive expert's place holds must not matter.
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
    """The whole loss and its parts, float32 scalars."""
    task = functional.cross_entropy(logits_BC.float(), labels_B)
    explore = exploration_loss(p_BM)
    exploit = exploitation_loss(expert_logits_BMC, active_BM, labels_B)
    loss = task + config.explore * explore + config.exploit * exploit
    parts = {"task": task, "explore": explore, "exploit": exploit}
    return loss, {name: part.detach() for name, part in parts.items()}
