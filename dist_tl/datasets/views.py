"""Weak and strong views of images: what a job says about them, and the draws.

A weak view moves an image by a few whole pixels and may mirror it. A strong view is a weak one
that then goes through a few operations picked at random (after RandAugment, Cubuk et al.,
arXiv:1909.13719), noise, and a cut-out (after DeVries and Taylor, arXiv:1708.04552).

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

# Lengths are shares of the side, so a preset means the same at 8 and at 224 pixels.
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # Strokes on black. No mirroring: it turns a 2 into an S. At 8x8: moves of 1 pixel, 9 degrees,
    # squares of 1 to 2 pixels. Larger squares hide what tells a 3 from a 9, even from a person.
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
    """How images are varied. `kind` names a preset; a field given beside it replaces the preset's.

    In a job file `views: digits` is short for `views: {kind: digits}`.
    """

    kind: Literal["none", "digits", "natural"] = Field(
        default="none", description="Preset: no variation, strokes on black, or photographs."
    )
    flip: bool = Field(
        default=False,
        description="Mirror half of the images left to right; not where it changes the class.",
    )
    max_shift: float = Field(
        default=0.0, ge=0.0, le=0.5, description="Furthest move each way, as a share of the side."
    )
    fill: float | Literal["reflect", "edge"] = Field(
        default="reflect",
        description="What lies outside the image: a pixel value in [-1, 1] (-1 is black), its "
        "mirror image, or its edge. Cut-outs use the value, or middle gray.",
    )
    operations: tuple[Operation, ...] = Field(
        default=(), description="Operations that a strong view picks from."
    )
    num_operations: int = Field(
        default=0, ge=0, description="How many different operations a strong view picks."
    )
    magnitude: float = Field(
        default=0.5,
        gt=0.0,
        le=1.0,
        description="Largest amount of an operation; 1 is RandAugment's.",
    )
    noise_std: float = Field(
        default=0.0,
        ge=0.0,
        le=2.0,
        description="Gaussian noise of strong views, on pixels in [-1, 1].",
    )
    cutout: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="Largest side of the cut-out, as a share of the side.",
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
                f"{len(self.operations)} operations to pick from"
            )
        if isinstance(self.fill, float) and not -1.0 <= self.fill <= 1.0:
            raise ValueError(f"fill: expected a pixel value in [-1, 1], got {self.fill}")
        return self


class Views:
    """Draws views of batches. Holds no state: the generator that is handed in decides all.

    Every image of a batch gets draws of its own. They are made on the generator's device and
    moved to the images', so a GPU and a CPU see the same views of the same seed.
    """

    def __init__(self, config: ViewsConfig) -> None:
        self.config = config

    def weak(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """The images moved and mirrored as the config says.

        Args:
            images: floating [N, C, H, W] in [-1, 1], on any device.
            rng: advanced by the draws; not touched where the config varies nothing.

        Returns:
            The same shape, dtype and device; `images` itself where the config varies nothing.

        Raises:
            ValueError: the images are not floating [N, C, H, W].
        """
        _require_images(images)
        height, width = images.shape[2:]
        config, num = self.config, len(images)
        max_down, max_right = round(config.max_shift * height), round(config.max_shift * width)
        if not (config.flip or max_down or max_right):
            return images
        down = _whole(num, -max_down, max_down, rng).to(images.device)
        right = _whole(num, -max_right, max_right, rng).to(images.device)
        mirrored = (_whole(num, 0, 1, rng) * config.flip).bool().to(images.device)
        return shift(images, down, right, mirrored, fill=config.fill)

    def strong(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """A weak view of the images, then picked operations, noise and a cut-out.

        Arguments, result and errors are those of :meth:`weak`; values are clamped to [-1, 1].
        """
        config = self.config
        images = self.weak(images, rng)
        if not (config.num_operations or config.noise_std or config.cutout):
            return images
        if config.num_operations:
            images = self._operate(images, rng)
        if config.noise_std:
            noise = torch.randn(images.shape, generator=rng, device=rng.device)
            images = images + config.noise_std * noise.to(images)
        if config.cutout:
            images = self._cut(images, rng)
        return images.clamp(-1.0, 1.0)

    def _operate(self, images: Tensor, rng: torch.Generator) -> Tensor:
        config, num = self.config, len(images)
        # The order of random numbers is a draw without replacement.
        order = torch.rand(num, len(config.operations), generator=rng, device=rng.device)
        picks = order.argsort(dim=1)[:, : config.num_operations]
        amounts = torch.rand(num, config.num_operations, generator=rng, device=rng.device)
        amounts = (2.0 * amounts - 1.0) * config.magnitude
        images = images.clone()
        for turn in range(config.num_operations):
            for index, name in enumerate(config.operations):
                rows = (picks[:, turn] == index).nonzero().squeeze(1)
                if len(rows) == 0:
                    continue
                amount, rows = amounts[rows, turn].to(images.device), rows.to(images.device)
                images[rows] = apply_operation(name, images[rows], amount, fill=config.fill)
        return images

    def _cut(self, images: Tensor, rng: torch.Generator) -> Tensor:
        num, _, height, width = images.shape
        largest = round(self.config.cutout * min(height, width))
        row, col = _whole(num, 0, height - 1, rng), _whole(num, 0, width - 1, rng)
        side = _whole(num, (largest + 1) // 2, largest, rng)
        row, col, side = (draw.to(images.device) for draw in (row, col, side))
        value = self.config.fill if isinstance(self.config.fill, float) else 0.0
        return cut_out(images, row, col, side, value=value)


def _whole(num: int, low: int, high: int, rng: torch.Generator) -> Tensor:
    """int64 [num], uniform over low..high, both included."""
    return torch.randint(low, high + 1, (num,), generator=rng, device=rng.device)


def _require_images(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"expected floating images [N, C, H, W], got {images.dtype} {tuple(images.shape)}"
        )
