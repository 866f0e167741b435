"""From the images that units exchange to the images that a network was made for.

Everywhere in dist_tl images are floats in [-1, 1]. A pretrained network expects other statistics,
another size, perhaps three channels: each step is asked for by name, none is guessed.
"""

from typing import Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError

ImageShape = tuple[int, int, int]


class Normalise(StrictModel):
    """Statistics of the images a network was trained on, for pixels in [0, 1]."""

    mean: tuple[float, ...] = Field(min_length=1, description="One number, or one a channel.")
    std: tuple[float, ...] = Field(min_length=1, description="One number, or one a channel; > 0.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.std) <= 0.0:
            raise ValueError(f"std must be > 0, got {self.std}")
        return self


class InputConfig(StrictModel):
    """What is done to images in [-1, 1] before a network sees them."""

    normalise: Normalise | None = Field(
        default=None,
        description="Mean and standard deviation for pixels in [0, 1]; without it images stay in "
        "[-1, 1]. A pretrained network that brings its own statistics uses those.",
    )
    resize: int | None = Field(
        default=None,
        ge=1,
        description="Side in pixels to which images are resized (bilinear, antialiased).",
    )
    grey_to_rgb: bool = Field(
        default=False, description="Repeat the one channel of grey images three times."
    )

    def adapted_shape(self, image_shape: ImageShape) -> ImageShape:
        """Shape (C, H, W) that the network sees when it is given images of `image_shape`.

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
                        "give one a channel, or set grey_to_rgb for a colour network on grey images"
                    )
        return (channels, self.resize or height, self.resize or width)


class InputAdapter(nn.Module):
    """Resizes, repeats and normalises images in [-1, 1], in float32 whatever their dtype."""

    def __init__(self, config: InputConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] to the shape and statistics the network expects, same dtype."""
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
