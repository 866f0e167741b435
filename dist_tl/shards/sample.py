"""Pseudo samples and their encoding in a shard: image, label, provenance.

Not covered: packing samples into a tar (`tar`) and their order (`order`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_tl.errors import NumericsError, ShardError
from dist_tl.shards.pixels import decode_image, decode_npy, encode_npy, encode_png

Format = Literal["png", "npy"]
KEY_DIGITS = 12
_IMAGE_DTYPES = (np.uint8, np.float32)
_MAX_LABEL_DIGITS = 9
_MAX_JSON_BYTES = 1 << 20


@dataclass(frozen=True)
class PseudoSample:
    """One generated image.

    Attributes:
        number: the sample's number in its stage, s; seeds all its random draws.
        image: uint8 [H, W, C]; or float32 for inputs that are not pictures and must not be rounded.
        label: source class, or None.
        soft: float32 [K], a probability vector over source classes, or None.
        provenance: JSON data that describes how the sample was generated.
    """

    number: int
    image: NDArray[np.uint8] | NDArray[np.float32]
    label: int | None = None
    soft: NDArray[np.float32] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


def quantise(images: Tensor, *, numbers: Sequence[int]) -> NDArray[np.uint8]:
    """Converts float images to stored pixels: -1 to 0, 1 to 255. The only function that rounds.

    Args:
        images: float32 [N, C, H, W], expected in [-1, 1]; values outside are clamped.
        numbers: the N sample numbers, for the error message.

    Returns:
        uint8 [N, H, W, C], contiguous.

    Raises:
        ValueError: another dtype or shape.
        NumericsError: a pixel is not finite; names the sample.
    """
    _check_images(images, numbers)
    levels = ((images + 1.0) * 127.5).round().clamp(0.0, 255.0).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def as_inputs(images: Tensor, *, numbers: Sequence[int]) -> NDArray[np.float32]:
    """Converts inputs that are not pictures to float32 [N, H, W, C], contiguous, without rounding.

    Args:
        images: float32 [N, C, H, W], any finite numbers.
        numbers: the N sample numbers, for the error message.

    Raises:
        ValueError: another dtype or shape.
        NumericsError: a number is not finite; names the sample.
    """
    _check_images(images, numbers)
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _check_images(images: Tensor, numbers: Sequence[int]) -> None:
    if images.dtype != torch.float32 or images.ndim != 4 or len(images) != len(numbers):
        raise ValueError(
            f"expected float32 [{len(numbers)}, C, H, W], got {images.dtype} {tuple(images.shape)}"
        )
    finite = images.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise NumericsError(
            f"pseudo sample {numbers[first]} has pixels that are not finite "
            f"({int((~finite).sum())} of {len(numbers)} in its batch); check the generator"
        )


def dequantise(pixels: NDArray[np.uint8] | Tensor) -> Tensor:
    """Converts stored pixels, uint8 [N, H, W, C], to float32 [N, C, H, W] in [-1, 1]."""
    levels = torch.as_tensor(pixels).permute(0, 3, 1, 2).to(torch.float32)
    return (levels / 127.5 - 1.0).contiguous()


def key_of(number: int) -> str:
    """Returns the key of sample `number` in its tar.

    Raises:
        ValueError: negative, or too long for a key.
    """
    if not 0 <= number < 10**KEY_DIGITS:
        raise ValueError(f"expected a sample number in 0..10^{KEY_DIGITS} - 1, got {number}")
    return f"{number:0{KEY_DIGITS}d}"


def encode(sample: PseudoSample, *, format: Format = "png") -> dict[str, str | bytes]:
    """Encodes `sample` as a webdataset sample: `__key__`, and bytes by extension.

    The image is stored as `png`; or as `npy` if requested, if it has neither one nor three
    channels, or if it is float32. The label is stored as `cls`, the soft label as `soft.npy`, and
    the rest as `json`.

    Raises:
        ValueError: an invalid shape, dtype or label, or provenance that is not JSON.
        NumericsError: the soft label is not finite.
    """
    image = sample.image
    if image.dtype not in _IMAGE_DTYPES or image.ndim != 3:
        raise ValueError(
            f"expected a uint8 or float32 [H, W, C] image, got {image.dtype} {image.shape}"
        )
    members: dict[str, str | bytes] = {"__key__": key_of(sample.number)}
    if format == "png" and image.dtype == np.uint8 and image.shape[2] in (1, 3):
        members["png"] = encode_png(image.astype(np.uint8, copy=False))
    else:
        members["npy"] = encode_npy(image)
    if sample.label is not None:
        if not 0 <= sample.label < 10**_MAX_LABEL_DIGITS:
            raise ValueError(f"sample {sample.number}: expected a label >= 0, got {sample.label}")
        members["cls"] = b"%d" % sample.label
    if sample.soft is not None:
        members["soft.npy"] = _encode_soft(sample.number, sample.soft)
    members["json"] = json.dumps(
        dict(sample.provenance), sort_keys=True, separators=(",", ":"), allow_nan=False
    ).encode("ascii")
    return members


def _encode_soft(number: int, soft: NDArray[np.float32]) -> bytes:
    if soft.dtype != np.float32 or soft.ndim != 1:
        raise ValueError(f"sample {number}: expected float32 [K], got {soft.dtype} {soft.shape}")
    if not np.isfinite(soft).all():
        raise NumericsError(f"the soft label of pseudo sample {number} is not finite")
    return encode_npy(soft)


def decode(members: Mapping[str, str | bytes]) -> PseudoSample:
    """Decodes a sample that :func:`encode` wrote.

    Raises:
        ShardError: a member is missing, damaged, too large, or of an unknown kind.
    """
    number = decode_number(str(members.get("__key__")))
    try:
        soft = members.get("soft.npy")
        return PseudoSample(
            number=number,
            image=decode_pixels(members),
            label=decode_label(members["cls"]) if "cls" in members else None,
            soft=None if soft is None else decode_soft(soft),
            provenance=_decode_json(members.get("json", b"{}")),
        )
    except ShardError as error:
        raise ShardError(f"sample {number}: {error}") from None


def decode_number(key: str) -> int:
    """Returns the sample number of a key."""
    if len(key) != KEY_DIGITS or not (key.isascii() and key.isdigit()):
        raise ShardError(f"expected a key of {KEY_DIGITS} digits, got {key[:40]!r}")
    return int(key)


def decode_pixels(members: Mapping[str, Any]) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Decodes the uint8 (or, if npy, uint8 or float32) [H, W, C] image of a sample's members."""
    if "npy" in members:
        image = decode_npy(members["npy"])
        if image.ndim != 3:
            raise ShardError(f"expected an [H, W, C] image, got {image.dtype} {image.shape}")
        return image
    data = members.get("png") or members.get("jpg")
    if data is None:
        raise ShardError(f"no image among {sorted(members)}; expected png, jpg or npy")
    return decode_image(data)


def decode_label(data: Any) -> int:
    """Decodes the class number in a `.cls` member."""
    if not data.isdigit() or len(data) > _MAX_LABEL_DIGITS:
        raise ShardError(f"expected a class number, got {data[:40]!r}")
    return int(data)


def decode_soft(data: Any) -> NDArray[np.float32]:
    """Decodes the float32 [K] vector in a `.soft.npy` member."""
    soft = decode_npy(data)
    if soft.dtype != np.float32 or soft.ndim != 1:
        raise ShardError(f"expected a float32 [K] soft label, got {soft.dtype} {soft.shape}")
    return soft.astype(np.float32, copy=False)


def _decode_json(data: Any) -> dict[str, Any]:
    if len(data) > _MAX_JSON_BYTES:
        raise ShardError(f"provenance of {len(data)} bytes exceeds the limit of {_MAX_JSON_BYTES}")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"provenance is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ShardError(f"expected provenance to be a mapping, got {type(value).__name__}")
    return value
