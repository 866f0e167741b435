"""Decodes images to uint8 arrays: limits, orientation, channels, size.

Not covered: fetching the bytes (`folder.py`, `tars.py`).
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from dist_tl.errors import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png")
MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 64 * 2**20

_GRAY_MODES = ("1", "L", "LA", "La", "I", "F")


def decode_image(data: bytes, *, name: str) -> Image.Image:
    """Decodes a JPEG or PNG and applies its EXIF orientation.

    Args:
        name: name of the image for error messages.

    Raises:
        DataError: neither JPEG nor PNG, truncated, damaged, or more than 64 million pixels.
    """
    # Decoders raise nearly any exception for damaged bytes; all of them mean the same here.
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    except Image.DecompressionBombError:
        raise DataError(f"{name} has more than {MAX_PIXELS} pixels; scale it down") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} is neither a JPEG nor a PNG image; replace or remove it") from None
    except Exception as error:
        raise DataError(f"{name} cannot be decoded ({error}); replace or remove it") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name} has {width} x {height} pixels, more than {MAX_PIXELS}; scale it down"
        )
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:
        raise DataError(f"{name} cannot be decoded ({error}); replace or remove it") from None


def as_array(image: Image.Image, *, size: int | None, channels: int | None) -> NDArray[np.uint8]:
    """Converts an image to uint8 [H, W, C].

    Args:
        size: side of the square output, in pixels: the largest centred square is resized
            (bilinear, with antialiasing). None keeps height and width.
        channels: 1 for gray, 3 for colour. None keeps the image's own; transparency is dropped.
    """
    image = _eight_bits(image)
    gray = channels == 1 or (channels is None and image.mode in _GRAY_MODES)
    image = image.convert("L" if gray else "RGB")
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)
    array = np.array(image, dtype=np.uint8)
    return array[:, :, None] if array.ndim == 2 else array


def _eight_bits(image: Image.Image) -> Image.Image:
    # Pillow clips 16-bit gray at 255 in conversions; scaling preserves the picture.
    if not image.mode.startswith("I;16"):
        return image
    levels = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))
