"""Domain shifts of images: rotation, shrinking, noise, inversion.

Create experts for one domain each, and targets that mix domains, from a single data set.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from dist_tl.config import StrictModel
from dist_tl.seeds import numpy_rng


class DomainConfig(StrictModel):
    """A fixed transformation of every image; the steps are applied in this order."""

    scale: float = Field(
        default=1.0, gt=0, le=1, description="Scale of the image, centred on black."
    )
    rotate: Literal[0, 90, 180, 270] = Field(default=0, description="Degrees, counterclockwise.")
    mirror: bool = Field(default=False, description="Mirror left to right.")
    invert: bool = Field(default=False, description="Invert the levels.")
    noise: float = Field(
        default=0.0, ge=0, le=1, description="Standard deviation of noise, as a fraction of white."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the noise.")


def change_domain(
    images: NDArray[np.uint8], config: DomainConfig, *, numbers: Sequence[int]
) -> NDArray[np.uint8]:
    """Transforms images to another domain. Returns uint8 [N, H, W, C].

    Args:
        images: uint8 [N, H, W, C]; square images keep their shape.
        numbers: positions of the images in the source; they seed the noise.
    """
    changed = images if config.scale == 1.0 else _shrunk(images, config.scale)
    changed = np.rot90(changed, config.rotate // 90, axes=(1, 2))
    changed = changed[:, :, ::-1] if config.mirror else changed
    changed = 255 - changed if config.invert else changed
    if config.noise:
        changed = np.stack(
            [
                _noisy(image, config.noise, numpy_rng(config.seed, "domain noise", int(number)))
                for image, number in zip(changed, numbers, strict=True)
            ]
        )
    return np.ascontiguousarray(changed)


def _shrunk(images: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    _, height, width, _ = images.shape
    inner_height, inner_width = max(1, round(scale * height)), max(1, round(scale * width))
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    shrunk = np.zeros_like(images)
    for row, image in enumerate(images):
        for channel in range(image.shape[2]):
            small = Image.fromarray(image[:, :, channel]).resize((inner_width, inner_height))
            area = (slice(top, top + inner_height), slice(left, left + inner_width))
            shrunk[row, *area, channel] = np.asarray(small)
    return shrunk


def _noisy(
    image: NDArray[np.uint8], deviation: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    noisy = image + 255.0 * deviation * rng.standard_normal(image.shape)
    return np.rint(noisy).clip(0, 255).astype(np.uint8)
