"""Evaluates networks and hubs in batches.

Shape suffixes: N = images.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dist_tl.methods.hub.pathway import HubPathway, Paths

BATCH_SIZE = 256


def in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Applies `function` to images (N, C, H, W) in batches of 256; concatenates the outputs."""
    return torch.cat([function(batch) for batch in images.split(BATCH_SIZE)])


def hub_paths(hub: HubPathway, images: Tensor) -> Paths:
    """Returns the logits and routes of images (N, C, H, W), computed in batches of 256."""
    parts = [hub(batch, detailed=True) for batch in images.split(BATCH_SIZE)]
    return Paths(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
