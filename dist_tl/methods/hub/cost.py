"""Multiply-adds of networks, measured in a forward pass.

Counts matrix products, convolutions and attention (torch's FLOP counter), but not element-wise
operations, as is usual.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def multiply_adds(module: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Counts the multiply-adds of one image (C, H, W), by a forward pass in evaluation mode."""
    was_training = module.training
    device = next(module.parameters()).device
    with FlopCounterMode(display=False) as counter:
        module.eval()(torch.zeros(1, *image_shape, device=device))
    module.train(was_training)
    return counter.get_total_flops() // 2


def routed_multiply_adds(
    router: int, experts: Sequence[int], usage: Sequence[float], num_classes: int
) -> float:
    """Returns the mean multiply-adds of one image: C_R + sum_i P(i in route) C_i + M C^2.

    Args:
        router: multiply-adds of the router.
        experts: multiply-adds of each expert with its head.
        usage: share of the images routed to each expert; sums to k.
    """
    return (
        router
        + sum(share * cost for share, cost in zip(usage, experts, strict=True))
        + len(experts) * num_classes**2
    )
