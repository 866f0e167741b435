"""Image operations on batches, with one amount per image: shifts, warps, colour, cut-outs.

All functions take and return float [N, C, H, W] in [-1, 1] on any device and are deterministic:
random values are passed by the caller (`views.py`) as tensors of length N. Results may slightly
exceed [-1, 1]; the caller clamps.

`fill` defines the pixels outside an image: a pixel value, or "reflect" or "edge".
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Fill = float | str


def shift(images: Tensor, down: Tensor, right: Tensor, mirrored: Tensor, *, fill: Fill) -> Tensor:
    """Shifts images by whole pixels and mirrors the selected ones, without interpolation.

    Args:
        down, right: int64 [N], pixels; negative values shift up and left.
        mirrored: bool [N], whether to mirror left to right after the shift.
    """
    num, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device) - down[:, None]
    cols = torch.arange(width, device=images.device) - right[:, None]
    cols = torch.where(mirrored[:, None], cols.flip(1), cols)
    row_index, col_index = _inside(rows, height, fill), _inside(cols, width, fill)
    index = (row_index[:, :, None] * width + col_index[:, None, :]).view(num, 1, height * width)
    moved = images.flatten(2).gather(2, index.expand(num, channels, height * width))
    moved = moved.view_as(images)
    if isinstance(fill, str):
        return moved
    outside = (rows != row_index)[:, :, None] | (cols != col_index)[:, None, :]
    return moved.masked_fill(outside[:, None], fill)


def _inside(index: Tensor, length: int, fill: Fill) -> Tensor:
    if fill == "reflect":
        index = index.abs()
        index = (length - 1) - ((length - 1) - index).abs()
    return index.clamp(0, length - 1)


def warp(images: Tensor, matrix: Tensor, offset: Tensor, *, fill: Fill) -> Tensor:
    """Resamples images bilinearly: pixel p, relative to the centre, reads matrix @ p + offset.

    Args:
        matrix: [N, 2, 2] over (x, y), in pixels.
        offset: [N, 2] over (x, y), as a fraction of the width and height.
    """
    height, width = images.shape[2:]
    # grid_sample defines both sides as 2, regardless of their length.
    aspect = torch.tensor([[1.0, height / width], [width / height, 1.0]], device=images.device)
    theta = torch.cat([matrix * aspect, 2.0 * offset[:, :, None]], dim=2).to(images.dtype)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    if isinstance(fill, str):
        mode = {"reflect": "reflection", "edge": "border"}[fill]
        return functional.grid_sample(images, grid, padding_mode=mode, align_corners=False)
    return functional.grid_sample(images - fill, grid, align_corners=False) + fill


def cut_out(images: Tensor, row: Tensor, col: Tensor, side: Tensor, *, value: float) -> Tensor:
    """Sets a square of each image to `value`; clips it at the border.

    Args:
        row, col, side: int64 [N], centre of the square and its side in pixels.
    """
    rows = torch.arange(images.shape[2], device=images.device) - (row - side // 2)[:, None]
    cols = torch.arange(images.shape[3], device=images.device) - (col - side // 2)[:, None]
    in_rows = (rows >= 0) & (rows < side[:, None])
    in_cols = (cols >= 0) & (cols < side[:, None])
    return images.masked_fill((in_rows[:, :, None] & in_cols[:, None, :])[:, None], value)


def apply_operation(name: str, images: Tensor, amount: Tensor, *, fill: Fill) -> Tensor:
    """Applies the operation `name` with an amount in [-1, 1] per image; 0 is the identity."""
    if name in COLOUR:
        return COLOUR[name](images, amount.to(images.dtype)[:, None, None, None])
    matrix, offset = _geometry(name, amount)
    return warp(images, matrix, offset, fill=fill)


GEOMETRIC = ("rotate", "scale", "shear_x", "shear_y", "translate_x", "translate_y")
# Strength at amount 1: degrees, factor, slope, fraction of the side.
_MAX_ROTATION_DEG, _MAX_SCALE, _MAX_SHEAR, _MAX_TRANSLATION = 30.0, 1.5, 0.3, 0.3


def _geometry(name: str, amount: Tensor) -> tuple[Tensor, Tensor]:
    one, zero = torch.ones_like(amount), torch.zeros_like(amount)
    rows, offset = (one, zero, zero, one), (zero, zero)
    match name:
        case "rotate":
            angle = amount * math.radians(_MAX_ROTATION_DEG)
            rows = (angle.cos(), -angle.sin(), angle.sin(), angle.cos())
        case "scale":
            factor = _MAX_SCALE**-amount
            rows = (factor, zero, zero, factor)
        case "shear_x":
            rows = (one, amount * _MAX_SHEAR, zero, one)
        case "shear_y":
            rows = (one, zero, amount * _MAX_SHEAR, one)
        case "translate_x":
            offset = (amount * _MAX_TRANSLATION, zero)
        case "translate_y":
            offset = (zero, amount * _MAX_TRANSLATION)
    return torch.stack(rows, dim=1).view(-1, 2, 2), torch.stack(offset, dim=1)


def _gray(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    luma = torch.tensor([0.299, 0.587, 0.114], device=images.device, dtype=images.dtype)
    return (images * luma[:, None, None]).sum(dim=1, keepdim=True)


# Scales the difference between the image and its reference by 0.1 to 1.9.
def _enhance(reference: Tensor | float, images: Tensor, amount: Tensor) -> Tensor:
    return (reference + (images - reference) * (1.0 + 0.9 * amount)).clamp(-1.0, 1.0)


def _brightness(images: Tensor, amount: Tensor) -> Tensor:
    return _enhance(-1.0, images, amount)


def _contrast(images: Tensor, amount: Tensor) -> Tensor:
    return _enhance(_gray(images).mean(dim=(2, 3), keepdim=True), images, amount)


def _saturation(images: Tensor, amount: Tensor) -> Tensor:
    # A gray image equals its reference, so it does not change.
    return _enhance(_gray(images), images, amount)


def _sharpness(images: Tensor, amount: Tensor) -> Tensor:
    channels = images.shape[1]
    kernel = torch.ones(3, 3, device=images.device, dtype=images.dtype)
    kernel[1, 1] = 5.0
    kernel = (kernel / kernel.sum()).expand(channels, 1, 3, 3)
    padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
    return _enhance(functional.conv2d(padded, kernel, groups=channels), images, amount)


def _posterize(images: Tensor, amount: Tensor) -> Tensor:
    # Drops up to 4 of the 8 bits of a level.
    step = 2.0 ** (4.0 * amount.abs()).round()
    levels = ((images + 1.0) * 127.5).round()
    posterized = (levels / step).floor() * step / 127.5 - 1.0
    return torch.where(step > 1.0, posterized, images)


def _solarize(images: Tensor, amount: Tensor) -> Tensor:
    threshold = 1.0 - 2.0 * amount.abs()
    return torch.where(images > threshold, -images, images)


COLOUR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
}
