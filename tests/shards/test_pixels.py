"""Image and array encoding: compatibility with other readers, and rejected input."""

import io
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dist_tl.errors import ShardError
from dist_tl.shards import pixels
from dist_tl.shards.pixels import decode_image, decode_npy, encode_npy, encode_png


def image_of(height, width, channels, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def pillow_png(image, mode=None, **options):
    stream = io.BytesIO()
    Image.fromarray(np.squeeze(image), mode).save(stream, "PNG", **options)
    return stream.getvalue()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.integers(0, 99))
def test_pillow_reads_the_pixels_that_were_written(height, width, channels, seed):
    image = image_of(height, width, channels, seed)
    with Image.open(io.BytesIO(encode_png(image))) as opened:
        opened.load()
        assert opened.mode == {1: "L", 3: "RGB"}[channels]
        np.testing.assert_array_equal(np.asarray(opened).reshape(image.shape), image)


# One stored block holds 65,535 bytes: 1 + 65,534 grey pixels is the largest row that fits.
@pytest.mark.parametrize("shape", [(1, 65534, 1), (1, 65535, 1), (150, 150, 3), (3, 65535, 1)])
def test_images_of_one_and_more_blocks_round_trip(shape):
    image = image_of(*shape)
    data = encode_png(image)
    np.testing.assert_array_equal(decode_image(data), image)
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(np.asarray(opened).reshape(shape), image)


def test_png_bytes_never_change():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert encode_png(image).hex() == (
        "89504e470d0a1a0a0000000d4948445200000002000000020802000000fdd49a73"
        "000000194944415478010"
        "10e00f1ff0000010203040500060708090a0b013b0043"
        "39c1271b0000000049454e44ae426082"
    )


@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("channels", [1, 3])
def test_compressed_pngs_of_other_tools_are_read(level, channels):
    image = image_of(9, 7, channels)
    data = pillow_png(image, compress_level=level)
    np.testing.assert_array_equal(decode_image(data), image)


def test_jpegs_of_other_tools_are_read():
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 128, np.uint8)).save(stream, "JPEG", quality=95)
    assert np.abs(decode_image(stream.getvalue()).astype(int) - 128).max() <= 2


@pytest.mark.parametrize("offset", [30, 45, 80])
def test_truncated_or_altered_compressed_pngs_are_rejected(offset):
    data = bytearray(pillow_png(image_of(9, 7, 3)))
    data[offset] ^= 0xFF
    with pytest.raises(ShardError):
        decode_image(bytes(data))
    with pytest.raises(ShardError):
        decode_image(bytes(data[:offset]))


def test_a_stored_png_with_a_damaged_second_block_is_rejected():
    data = bytearray(encode_png(image_of(150, 150, 3)))
    second = data.index(b"\x01", 43 + 5 + 65_535)  # the last block begins with 1
    data[second + 1] ^= 0xFF
    with pytest.raises(ShardError):
        decode_image(bytes(data))


def test_images_with_too_many_pixels_are_rejected_before_decoding(monkeypatch):
    data = pillow_png(np.zeros((40, 40), np.uint8))
    monkeypatch.setattr(pixels, "MAX_PIXELS", 40 * 39)
    with pytest.raises(ShardError, match="too many pixels"):
        decode_image(data)


def test_a_header_with_a_huge_size_is_rejected_without_allocation():
    head = bytearray(encode_png(image_of(2, 2, 3)))
    head[16:24] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    with pytest.raises(ShardError):
        decode_image(bytes(head))


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16"])
def test_other_image_modes_than_grey_and_rgb_are_rejected(mode):
    stream = io.BytesIO()
    Image.new(mode, (4, 4)).save(stream, "PNG")
    with pytest.raises(ShardError, match="grey or RGB"):
        decode_image(stream.getvalue())


@pytest.mark.parametrize(
    "image",
    [np.zeros((2, 2, 3), np.float32), np.zeros((2, 2), np.uint8), np.zeros((2, 2, 2), "u1")],
)
def test_only_grey_and_rgb_uint8_images_are_encoded_as_png(image):
    with pytest.raises(ValueError, match="expected uint8"):
        encode_png(image)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=4), st.sampled_from([np.uint8, np.float32]))
def test_arrays_are_compatible_with_numpy_in_both_directions(shape, dtype):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    ours = encode_npy(array)
    loaded = np.load(io.BytesIO(ours), allow_pickle=False)
    assert loaded.dtype == dtype
    np.testing.assert_array_equal(loaded, array)
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    np.testing.assert_array_equal(decode_npy(stream.getvalue()), array)
    np.testing.assert_array_equal(decode_npy(ours), array)


class Bomb:
    executed = False

    def __reduce__(self):
        return (setattr, (Bomb, "executed", True))


def test_pickles_in_arrays_are_rejected_and_not_executed():
    stream = io.BytesIO()
    np.save(stream, np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ShardError, match="uint8 or float32"):
        decode_npy(stream.getvalue())
    with pytest.raises(ShardError, match="npy"):
        decode_npy(pickle.dumps(Bomb()))
    assert not Bomb.executed


@pytest.mark.parametrize("dtype", [np.float64, np.int64, ">f4", "U3"])
def test_arrays_of_other_dtypes_are_rejected(dtype):
    stream = io.BytesIO()
    np.save(stream, np.zeros(3, dtype))
    with pytest.raises(ShardError, match="uint8 or float32"):
        decode_npy(stream.getvalue())


def test_arrays_in_fortran_order_are_rejected():
    stream = io.BytesIO()
    np.save(stream, np.asfortranarray(np.zeros((2, 3), np.float32)))
    with pytest.raises(ShardError, match="C-ordered"):
        decode_npy(stream.getvalue())


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x"])
def test_arrays_that_do_not_match_their_header_are_rejected(change):
    with pytest.raises(ShardError, match="shape"):
        decode_npy(change(encode_npy(np.ones(5, np.float32))))


def test_headers_with_an_overflowing_shape_are_rejected():
    data = encode_npy(np.ones((2, 2), np.uint8)).replace(b"(2, 2), }    ", b"(2**9, 9)}   ")
    with pytest.raises(ShardError):
        decode_npy(data)
    huge = encode_npy(np.ones((1, 1), np.uint8)).replace(
        b"(1, 1), }" + b" " * 9, b"(9999999999, 0), }"
    )
    with pytest.raises(ShardError, match="shape"):
        decode_npy(huge[:-1] + b"xx")
