"""Weak and strong views of images (augmentation): configuration and sampling.

A weak view shifts an image by a few whole pixels and may mirror it. A strong view is a weak view
with a few random operations (after RandAugment, Cubuk et al., arXiv:1909.13719), noise, and a
cut-out (after DeVries and Taylor, arXiv:1708.04552).

Not covered: the operations themselves (`augment.py`).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dist_tl.config import StrictModel
from dist_tl.datasets.augment import apply_operation, cut_out, shift

Operation = Literal[
    "rotate",
    "scale",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "brightness",
    "contrast",
    "saturation",
    "sharpness",
    "posterize",
    "solarize",
]

# Lengths are fractions of the side, so a preset has the same effect at 8 and at 224 pixels.
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # Strokes on black. No mirroring: it changes a 2 to an S. At 8x8: shifts of 1 pixel, 9 degrees,
    # squares of 1 to 2 pixels. Larger squares hide the difference between a 3 and a 9.
    "digits": {
        "max_shift": 0.125,
        "fill": -1.0,
        "operations": ("rotate", "scale", "shear_x", "contrast"),
        "num_operations": 1,
        "magnitude": 0.3,
        "noise_std": 0.15,
        "cutout": 0.25,
    },
    "natural": {
        "flip": True,
        "max_shift": 0.125,
        "fill": "reflect",
        "operations": (
            "rotate",
            "shear_x",
            "shear_y",
            "translate_x",
            "translate_y",
            "brightness",
            "contrast",
            "saturation",
            "sharpness",
            "posterize",
            "solarize",
        ),
        "num_operations": 2,
        "magnitude": 1.0,
        "cutout": 0.5,
    },
}


class ViewsConfig(StrictModel):
    """Data augmentation. `kind` selects a preset; additional fields override the preset.

    In a job file `views: digits` is short for `views: {kind: digits}`.
    """

    kind: Literal["none", "digits", "natural"] = Field(
        default="none", description="Preset: no augmentation, strokes on black, or photographs."
    )
    flip: bool = Field(
        default=False,
        description="Mirror half of the images left to right; disable it if it changes the class.",
    )
    max_shift: float = Field(
        default=0.0, ge=0.0, le=0.5, description="Largest shift, as a fraction of the side."
    )
    fill: float | Literal["reflect", "edge"] = Field(
        default="reflect",
        description="Pixels outside the image: a pixel value in [-1, 1] (-1 is black), the "
        "reflected image, or its edge. Cut-outs use the value, or middle gray.",
    )
    operations: tuple[Operation, ...] = Field(
        default=(), description="Candidate operations of strong views."
    )
    num_operations: int = Field(
        default=0, ge=0, description="Number of different operations per strong view."
    )
    magnitude: float = Field(
        default=0.5,
        gt=0.0,
        le=1.0,
        description="Largest amount of an operation; 1 corresponds to RandAugment.",
    )
    noise_std: float = Field(
        default=0.0,
        ge=0.0,
        le=2.0,
        description="Standard deviation of noise in strong views, on pixels in [-1, 1].",
    )
    cutout: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="Largest side of the cut-out, as a fraction of the image's side.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, data: Any) -> Any:
        given = {"kind": data} if isinstance(data, str) else data
        if not isinstance(given, Mapping):
            return data
        kind = given.get("kind", "none")
        return {**PRESETS.get(kind, {}), **given} if isinstance(kind, str) else dict(given)

    @model_validator(mode="after")
    def _is_consistent(self) -> "ViewsConfig":
        if len(set(self.operations)) < len(self.operations):
            raise ValueError("operations: one is listed twice; keep it once")
        if self.num_operations > len(self.operations):
            raise ValueError(
                f"num_operations: {self.num_operations} is more than the "
                f"{len(self.operations)} operations to choose from"
            )
        if isinstance(self.fill, float) and not -1.0 <= self.fill <= 1.0:
            raise ValueError(f"fill: expected a pixel value in [-1, 1], got {self.fill}")
        return self


class Views:
    """Samples views of batches. Stateless: all randomness comes from the passed generator.

    Every image of a batch gets its own draws. They are made on the generator's device and then
    moved to the images' device, so a seed gives the same views on GPU and CPU.
    """

    def __init__(self, config: ViewsConfig) -> None:
        self.config = config

    def weak(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Returns the images, shifted and mirrored randomly.

        Args:
            images: floating [N, C, H, W] in [-1, 1], on any device.
            rng: advanced by the draws; not used if the config disables augmentation.

        Returns:
            Same shape, dtype and device; `images` itself if the config disables augmentation.

        Raises:
            ValueError: the images are not floating [N, C, H, W].
        """
        _require_images(images)
        height, width = images.shape[2:]
        config, num = self.config, len(images)
        max_down, max_right = round(config.max_shift * height), round(config.max_shift * width)
        if not (config.flip or max_down or max_right):
            return images
        down = _randint(num, -max_down, max_down, rng).to(images.device)
        right = _randint(num, -max_right, max_right, rng).to(images.device)
        mirrored = (_randint(num, 0, 1, rng) * config.flip).bool().to(images.device)
        return shift(images, down, right, mirrored, fill=config.fill)

    def strong(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Returns a weak view of the images with random operations, noise and a cut-out.

        Arguments, result and errors are those of :meth:`weak`; values are clamped to [-1, 1].
        """
        config = self.config
        images = self.weak(images, rng)
        if not (config.num_operations or config.noise_std or config.cutout):
            return images
        if config.num_operations:
            images = self._apply_operations(images, rng)
        if config.noise_std:
            noise = torch.randn(images.shape, generator=rng, device=rng.device)
            images = images + config.noise_std * noise.to(images)
        if config.cutout:
            images = self._cut_out(images, rng)
        return images.clamp(-1.0, 1.0)

    def _apply_operations(self, images: Tensor, rng: torch.Generator) -> Tensor:
        config, num = self.config, len(images)
        # The sort order of random numbers is a draw without replacement.
        order = torch.rand(num, len(config.operations), generator=rng, device=rng.device)
        picks = order.argsort(dim=1)[:, : config.num_operations]
        amounts = torch.rand(num, config.num_operations, generator=rng, device=rng.device)
        amounts = (2.0 * amounts - 1.0) * config.magnitude
        images = images.clone()
        for slot in range(config.num_operations):
            for index, name in enumerate(config.operations):
                rows = (picks[:, slot] == index).nonzero().squeeze(1)
                if len(rows) == 0:
                    continue
                amount, rows = amounts[rows, slot].to(images.device), rows.to(images.device)
                images[rows] = apply_operation(name, images[rows], amount, fill=config.fill)
        return images

    def _cut_out(self, images: Tensor, rng: torch.Generator) -> Tensor:
        num, _, height, width = images.shape
        largest = round(self.config.cutout * min(height, width))
        row, col = _randint(num, 0, height - 1, rng), _randint(num, 0, width - 1, rng)
        side = _randint(num, (largest + 1) // 2, largest, rng)
        row, col, side = (draw.to(images.device) for draw in (row, col, side))
        value = self.config.fill if isinstance(self.config.fill, float) else 0.0
        return cut_out(images, row, col, side, value=value)


def _randint(num: int, low: int, high: int, rng: torch.Generator) -> Tensor:
    """Samples int64 [num] uniformly from low..high, both included."""
    return torch.randint(low, high + 1, (num,), generator=rng, device=rng.device)


def _require_images(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"expected floating images [N, C, H, W], got {images.dtype} {tuple(images.shape)}"
        )
