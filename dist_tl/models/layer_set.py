"""A head on the pooled, unit-length outputs of some of a base network's blocks.

The result of a layer search becomes an ordinary network that can be saved, loaded and fine-tuned.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError
from dist_tl.models.hugging_face import TransformersConfig
from dist_tl.models.perceptron import PerceptronConfig
from dist_tl.models.resnet import ResNetConfig
from dist_tl.models.taps import record_blocks
from dist_tl.models.timm_networks import TimmConfig

MIN_NORM = 1e-12
BaseConfig = Annotated[
    ResNetConfig | TransformersConfig | TimmConfig | PerceptronConfig, Field(discriminator="kind")
]


class LayerSetConfig(StrictModel):
    """Concatenated features of several blocks of a base network."""

    kind: Literal["layer_set"] = "layer_set"
    base: BaseConfig
    blocks: tuple[int, ...] = Field(
        min_length=1,
        description="Indices of the blocks in depth order; the last index is the head's input.",
    )
    cells: int = Field(
        default=4, ge=1, le=8, description="Maps are averaged to at most cells x cells."
    )


class LayerSetTrunk(nn.Module):
    """Maps images (N, C, H, W) to (N, D): the blocks' unit vectors over sqrt(number of blocks)."""

    def __init__(self, config: LayerSetConfig, base: nn.Module, num_blocks: int) -> None:
        super().__init__()
        if not all(0 <= block < num_blocks for block in config.blocks):
            raise ConfigError(
                f"layer_set: blocks {list(config.blocks)}: expected blocks 0 to {num_blocks - 1}"
            )
        self.base = base
        self.config = config
        self.blocks, self.cells = config.blocks, config.cells

    def forward(self, images: Tensor) -> Tensor:
        outputs = record_blocks(self.base, images)
        parts = [self._vector(outputs[block]) for block in self.blocks]
        return torch.cat(parts, dim=1) / math.sqrt(len(parts))

    def _vector(self, output: Tensor) -> Tensor:
        if output.ndim == 4:
            height, width = (min(self.cells, side) for side in output.shape[2:])
            output = functional.adaptive_avg_pool2d(output, (height, width)).flatten(1)
        elif output.ndim == 3:
            output = output.mean(dim=1)
        return output / output.norm(dim=1, keepdim=True).clamp_min(MIN_NORM)


def count_blocks(base: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Returns the number of block outputs of a trunk, including the head's input."""
    was_training = base.training
    with torch.no_grad():
        count = len(record_blocks(base.eval(), torch.zeros(1, *image_shape)))
    base.train(was_training)
    return count
