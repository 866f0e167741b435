"""Evaluates networks and hubs in batches, and averages over groups of images."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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


def group_means(values: NDArray[Any], groups: NDArray[np.int64], count: int) -> NDArray[Any]:
    """Returns the mean over repeats and images of every group, (count, ...).

    Args:
        values: (repeats, images, ...).
        groups: group of every image, 0 to count - 1.
    """
    return np.array([values[:, groups == group].mean(axis=(0, 1)) for group in range(count)])
