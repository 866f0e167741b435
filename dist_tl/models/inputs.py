"""Preprocessing from dist_tl's images to those that a network expects.

Images in dist_tl are floats in [-1, 1]. A pretrained network may expect other statistics, another
size or three channels: every step is configured explicitly, none is guessed.
"""

from typing import Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError

ImageShape = tuple[int, int, int]


class Normalise(StrictModel):
    """Mean and standard deviation of a network's training images, for pixels in [0, 1]."""

    mean: tuple[float, ...] = Field(min_length=1, description="One number, or one per channel.")
    std: tuple[float, ...] = Field(min_length=1, description="One number, or one per channel; > 0.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.std) <= 0.0:
            raise ValueError(f"std must be > 0, got {self.std}")
        return self


class InputConfig(StrictModel):
    """Preprocessing of images in [-1, 1] before they enter a network."""

    normalise: Normalise | None = Field(
        default=None,
        description="Mean and standard deviation for pixels in [0, 1]; absent: the statistics "
        "saved with a pretrained network, or else images stay in [-1, 1].",
    )
    resize: int | None = Field(
        default=None,
        ge=1,
        description="Side in pixels to which images are resized (bilinear, antialiased).",
    )
    grey_to_rgb: bool = Field(
        default=False, description="Repeat the single channel of grey images three times."
    )

    def adapted_shape(self, image_shape: ImageShape) -> ImageShape:
        """Returns the shape (C, H, W) of images of `image_shape` after preprocessing.

        Raises:
            ConfigError: the images are not grey, or `normalise` has another number of channels.
        """
        channels, height, width = image_shape
        if self.grey_to_rgb:
            if channels != 1:
                raise ConfigError(
                    f"grey_to_rgb: expected images of 1 channel, got {channels}; leave it out"
                )
            channels = 3
        if self.normalise is not None:
            for name, values in (("mean", self.normalise.mean), ("std", self.normalise.std)):
                if len(values) not in (1, channels):
                    raise ConfigError(
                        f"normalise.{name}: expected 1 or {channels} numbers, got {len(values)}; "
                        "give one per channel, or set grey_to_rgb for a colour network"
                    )
        return (channels, self.resize or height, self.resize or width)


class InputAdapter(nn.Module):
    """Resizes, repeats and normalises images in [-1, 1]; computes in float32 for every dtype."""

    def __init__(self, config: InputConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (N, C, H, W) in [-1, 1] to the expected shape and statistics, same dtype."""
        adapted = images.float()
        if self.config.resize is not None and adapted.shape[-2:] != (self.config.resize,) * 2:
            size = (self.config.resize, self.config.resize)
            adapted = functional.interpolate(adapted, size=size, mode="bilinear", antialias=True)
        if self.config.grey_to_rgb:
            adapted = adapted.expand(-1, 3, -1, -1)
        if self.config.normalise is not None:
            # Plain numbers, not buffers: a cast of the network to bfloat16 must not round them.
            mean = adapted.new_tensor(self.config.normalise.mean)[:, None, None]
            std = adapted.new_tensor(self.config.normalise.std)[:, None, None]
            adapted = ((adapted + 1.0) * 0.5 - mean) / std
        return adapted.to(images.dtype)
