"""Feature maps of images: random features, and pooled blocks of a trained network.

Shape suffixes: N = items, D = pixels, F = features.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dist_tl.errors import ConfigError


def random_map(x_ND: Tensor, *, hidden: int, gain: float, rng: torch.Generator) -> Tensor:
    """Returns tanh(gain W x / sqrt(D)) for random normal W, (N, hidden)."""
    num_pixels = x_ND.shape[1]
    weights_FD = torch.randn(hidden, num_pixels, generator=rng)
    return torch.tanh(x_ND @ weights_FD.T * (gain / math.sqrt(num_pixels)))


def pooled_block(outputs: Sequence[Tensor], block: int, grid: int) -> Tensor:
    """Returns one block's output as vectors (N, F).

    Maps (N, C, H, W) are averaged to grid x grid cells at most, tokens (N, T, F) to one vector.

    Args:
        outputs: outputs of all blocks in depth order, the head's input last.

    Raises:
        ConfigError: there is no such block.
    """
    if not -len(outputs) <= block < len(outputs):
        raise ConfigError(
            f"block {block} is not one of the {len(outputs)} of the network; use 0 to "
            f"{len(outputs) - 1}, or -1 for the head's input"
        )
    output = outputs[block]
    if output.ndim == 4:
        cells = (min(grid, output.shape[2]), min(grid, output.shape[3]))
        return functional.adaptive_avg_pool2d(output, cells).flatten(1)
    return output.mean(dim=1) if output.ndim == 3 else output
