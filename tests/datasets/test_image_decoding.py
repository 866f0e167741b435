"""Decoding of JPEG and PNG: conversions, and errors that name the image."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from dist_tl.datasets import decode
from dist_tl.datasets.decode import as_array, decode_image
from dist_tl.errors import DataError


def encoded(array, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def decoded(data, size=None, channels=None):
    return as_array(decode_image(data, name="x.png"), size=size, channels=channels)


def test_gray_and_colour_pngs_are_decoded_exactly():
    np.testing.assert_array_equal(decoded(encoded(noise(5, 7))), noise(5, 7)[:, :, None])
    np.testing.assert_array_equal(decoded(encoded(noise(5, 7, 3))), noise(5, 7, 3))


def test_channels_are_converted():
    gray = encoded(noise(4, 4))
    np.testing.assert_array_equal(decoded(gray, channels=3), np.dstack([noise(4, 4)] * 3))
    assert decoded(encoded(noise(4, 4, 3)), channels=1).shape == (4, 4, 1)
    assert decoded(encoded(noise(4, 4, 4))).shape == (4, 4, 3)  # drops transparency


def test_the_stored_size_changes_no_pixel():
    np.testing.assert_array_equal(decoded(encoded(noise(6, 6, 3)), size=6), noise(6, 6, 3))


def test_shrinking_averages_pixels():
    stripes = np.tile(np.array([0, 200], np.uint8), (32, 16))
    assert np.abs(decoded(encoded(stripes), size=8).astype(int) - 100)[1:-1, 1:-1].max() <= 2


def test_a_wide_image_is_cropped_to_its_centre():
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 255
    assert decoded(encoded(wide), size=4).min() == 255


def test_sixteen_bit_gray_is_scaled_and_not_clipped():
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert decoded(encoded(levels)).ravel().tolist() == [0, 1, 128, 255]


def test_the_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate 90 degrees clockwise
    array = decoded(encoded(noise(8, 16, 3), "JPEG", exif=exif))
    assert array.shape == (16, 8, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_error_of_a_truncated_image_names_it(kind):
    data = encoded(noise(32, 32, 3), kind)
    with pytest.raises(DataError, match=r"x\.png cannot be decoded"):
        decode_image(data[: len(data) // 2], name="x.png")


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(noise(4, 4), "GIF")])
def test_the_error_of_another_format_names_the_image(data):
    with pytest.raises(DataError, match=r"cat/3\.jpg is neither a JPEG nor a PNG"):
        decode_image(data, name="cat/3.jpg")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_bytes_are_decoded_or_raise_a_data_error(kind):
    rng = np.random.default_rng(1)
    intact = np.frombuffer(encoded(noise(16, 16, 3), kind), np.uint8)
    num_rejected = 0
    for _ in range(150):
        data = intact.copy()
        data[rng.integers(len(data), size=4)] = rng.integers(256, size=4)
        try:
            assert decoded(data.tobytes()).dtype == np.uint8
        except DataError:
            num_rejected += 1
    assert num_rejected > 0


def test_an_image_above_the_pixel_limit_is_rejected_before_decoding(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 100)
    assert decoded(encoded(noise(10, 10))).shape == (10, 10, 1)
    truncated = encoded(noise(10, 11))[:-30]  # decoding would fail on it
    with pytest.raises(DataError, match="11 x 10 pixels, more than 100"):
        decode_image(truncated, name="x.png")


def test_a_decompression_bomb_is_a_data_error():
    bomb = bytearray(encoded(noise(2, 2)))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height in the PNG header
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(DataError, match=r"x\.png has more than 64000000 pixels"):
        decode_image(bytes(bomb), name="x.png")
