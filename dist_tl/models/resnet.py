"""A small pre-activation residual network for images of 8x8 to 64x64 pixels.

Its first stage keeps full resolution, and its last map may be pooled to 2x2 cells instead of one:
in tiny images position is as informative as presence.

After He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", arXiv:1603.05027.
"""

import math
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from dist_tl.errors import ConfigError
from dist_tl.models.inputs import ImageShape, InputAdapter, InputConfig


class ResNetConfig(InputConfig):
    """dist_tl's own residual network: fast on one CPU thread, accurate with few labels."""

    kind: Literal["resnet"] = "resnet"
    width: int = Field(
        default=16, ge=1, le=4096, description="Channels of the first stage; doubles each stage."
    )
    blocks: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(1, 1, 1),
        min_length=1,
        max_length=6,
        description="Residual blocks per stage; every stage except the first halves the image.",
    )
    norm: Literal["batch", "group"] = Field(
        default="batch",
        description="Batch norm, or group norm, which does not depend on the rest of the batch.",
    )
    stem_stride: Literal[1, 2, 4] = Field(
        default=1,
        description="Stride of the first convolution: 1 up to 32x32, 2 or 4 for larger images.",
    )
    pool: Literal[1, 2] = Field(
        default=2,
        description="The last map is averaged to pool x pool cells; 2 retains coarse positions.",
    )

    @property
    def total_stride(self) -> int:
        """Input pixels per cell of the last map, along one side."""
        return self.stem_stride * 2 ** (len(self.blocks) - 1)


class PreActivationBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), the shortcut averaged and widened if needed."""

    def __init__(self, num_inputs: int, num_outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.norm1 = _norm(norm, num_inputs)
        self.conv1 = nn.Conv2d(num_inputs, num_outputs, 3, stride, padding=1, bias=False)
        self.norm2 = _norm(norm, num_outputs)
        self.conv2 = nn.Conv2d(num_outputs, num_outputs, 3, padding=1, bias=False)
        self.pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
        widens = num_inputs != num_outputs
        self.widen = nn.Conv2d(num_inputs, num_outputs, 1, bias=False) if widens else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv1(functional.relu(self.norm1(images)))
        hidden = self.conv2(functional.relu(self.norm2(hidden)))
        return self.widen(self.pool(images)) + hidden


class ResNetTrunk(nn.Module):
    """Maps images (N, C, H, W) in [-1, 1] to feature vectors (N, D), D = last width x pool^2."""

    def __init__(self, config: ResNetConfig, image_shape: ImageShape) -> None:
        super().__init__()
        num_channels = _check_size(config, image_shape)
        self.inputs = InputAdapter(config)
        self.stem = nn.Conv2d(
            num_channels, config.width, 3, config.stem_stride, padding=1, bias=False
        )
        self.stages = nn.Sequential()
        width = config.width
        for index, num_blocks in enumerate(config.blocks):
            before, width = width, config.width * 2**index
            stride = 1 if index == 0 else 2
            first = PreActivationBlock(before, width, stride, config.norm)
            rest = [PreActivationBlock(width, width, 1, config.norm) for _ in range(num_blocks - 1)]
            self.stages.append(nn.Sequential(first, *rest))
        self.norm = _norm(config.norm, width)
        self.pool = nn.AdaptiveAvgPool2d(config.pool)
        self.num_features = width * config.pool**2
        self._initialise()

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.relu(self.norm(self.stages(self.stem(self.inputs(images)))))
        return self.pool(hidden).flatten(1)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _norm(kind: str, num_channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(num_channels)
    return nn.GroupNorm(math.gcd(8, num_channels), num_channels)


def _check_size(config: ResNetConfig, image_shape: ImageShape) -> int:
    """Returns the number of input channels; raises ConfigError if the images are too small."""
    channels, height, width = config.adapted_shape(image_shape)
    needed = config.total_stride * config.pool
    if min(height, width) < needed:
        raise ConfigError(
            f"resnet: {len(config.blocks)} stages, stem_stride {config.stem_stride} and pool "
            f"{config.pool} need images of {needed}x{needed} pixels or more, got {height}x{width}; "
            "use fewer stages, a smaller stem_stride, pool 1, or resize"
        )
    return channels
