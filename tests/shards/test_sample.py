"""Encoding of samples and conversion of pixels: round trips and rejected input."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_tl.errors import NumericsError, ShardError
from dist_tl.shards.sample import (
    PseudoSample,
    as_inputs,
    decode,
    dequantise,
    encode,
    quantise,
)


def same(a, b):
    return (
        a.number == b.number
        and np.array_equal(a.image, b.image)
        and a.label == b.label
        and np.array_equal(a.soft, b.soft)
        and dict(a.provenance) == dict(b.provenance)
    )


def images_of(values):
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, 1, -1)


def test_the_range_limits_become_the_first_and_last_level():
    levels = quantise(images_of([-1.0, 1.0, -7.0, 7.0]), numbers=[0])
    assert levels.tolist() == [[[[0], [255], [0], [255]]]]


def test_every_level_round_trips_through_floats():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(quantise(dequantise(levels), numbers=[0]), levels)


def test_the_rounding_error_is_at_most_half_a_level():
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 8, 8, generator=rng) * 2 - 1
    error = (dequantise(quantise(images, numbers=[0, 1])) - images).abs().max().item()
    assert error <= 0.5 / 127.5 + 1e-6


def test_channels_are_last_in_stored_pixels_and_second_in_floats():
    images = torch.zeros(2, 3, 4, 5)
    images[:, 1] = 1.0
    levels = quantise(images, numbers=[0, 1])
    assert levels.shape == (2, 4, 5, 3)
    assert levels[..., 1].min() == 255
    assert dequantise(levels).shape == (2, 3, 4, 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_error_of_non_finite_pixels_names_the_sample(bad):
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 1, 1] = bad
    with pytest.raises(NumericsError, match="sample 41 "):
        quantise(images, numbers=[40, 41, 42])


def test_quantise_rejects_other_dtypes_and_shapes():
    with pytest.raises(ValueError, match="expected float32"):
        quantise(torch.zeros(1, 3, 4, 4, dtype=torch.float64), numbers=[0])
    with pytest.raises(ValueError, match="expected float32"):
        quantise(torch.zeros(2, 3, 4, 4), numbers=[0])


@pytest.mark.parametrize("format", ["png", "npy"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("soft", [None, np.array([0.25, 0.75], np.float32)])
@pytest.mark.parametrize("label", [None, 0, 999_999_999])
def test_a_sample_round_trips(stage, format, channels, soft, label):
    image = np.random.default_rng(0).integers(0, 256, (4, 5, channels), dtype=np.uint8)
    sample = PseudoSample(3, image, label, soft, {"a": [1, None], "ü": "ß"})
    assert same(decode(encode(sample, format=format)), sample)


def test_members_are_named_as_webdataset_expects(stage):
    members = encode(stage.sample(12, soft=np.ones(1, np.float32)))
    assert members["__key__"] == "000000000012"
    assert sorted(members) == ["__key__", "cls", "json", "png", "soft.npy"]
    assert "npy" in encode(stage.sample(12), format="npy")


def test_bytes_do_not_depend_on_the_order_of_provenance(stage):
    one = replace(stage.sample(0), provenance={"a": 1, "b": {"c": 2, "d": 3}})
    two = replace(stage.sample(0), provenance={"b": {"d": 3, "c": 2}, "a": 1})
    assert encode(one) == encode(two)


@pytest.mark.parametrize("number", [-1, 10**12])
def test_numbers_too_long_for_a_key_are_rejected(stage, number):
    with pytest.raises(ValueError, match="sample number"):
        encode(replace(stage.sample(0), number=number))


@pytest.mark.parametrize(
    "fields",
    [
        {"label": -1},
        {"soft": np.ones(2)},
        {"soft": np.ones((1, 2), np.float32)},
        {"provenance": {"x": float("nan")}},
        {"image": np.zeros((4, 4), np.uint8)},
    ],
)
def test_samples_that_could_not_be_decoded_are_not_encoded(stage, fields):
    with pytest.raises(ValueError, match=r"expected|JSON"):
        encode(replace(stage.sample(0), **fields))


def test_the_error_of_a_non_finite_soft_label_names_the_sample(stage):
    with pytest.raises(NumericsError, match="sample 5 "):
        encode(stage.sample(5, soft=np.array([np.nan], np.float32)))


@pytest.mark.parametrize(
    ("member", "data"),
    [
        ("cls", b"-1"),
        ("cls", b"1" * 10),
        ("cls", b""),
        ("cls", "٣".encode()),
        ("json", b"[1]"),
        ("json", b"{"),
        ("json", b"[" * 100_000),
        ("json", json.dumps({"x": "y" * (1 << 20)}).encode()),
        ("png", b"not an image"),
        ("soft.npy", b"not an array"),
        ("npy", b"not an array"),
        ("__key__", "12"),
        ("__key__", "../../etc/pw"),
        ("__key__", "٣" * 12),
    ],
)
def test_damaged_members_are_rejected(stage, member, data):
    with pytest.raises(ShardError):
        decode({**encode(stage.sample(0)), member: data})


def test_a_sample_without_an_image_is_rejected(stage):
    members = encode(stage.sample(0))
    del members["png"]
    with pytest.raises(ShardError, match="no image"):
        decode(members)


def test_inputs_that_are_not_pictures_round_trip_exactly():
    images = torch.randn(2, 1, 1, 7)
    stored = as_inputs(images, numbers=[0, 1])
    sample = PseudoSample(number=1, image=stored[1], label=1)
    members = encode(sample, format="png")
    assert "npy" in members
    assert "png" not in members
    np.testing.assert_array_equal(decode(members).image, images[1].permute(1, 2, 0).numpy())


def test_the_error_of_non_finite_inputs_names_the_sample():
    images = torch.zeros(2, 1, 1, 3)
    images[1, 0, 0, 2] = float("nan")
    with pytest.raises(NumericsError, match="sample 8"):
        as_inputs(images, numbers=[7, 8])


@pytest.mark.parametrize("dtype", [np.float64])
def test_images_of_other_dtypes_are_rejected(dtype):
    with pytest.raises(ValueError, match="uint8 or float32"):
        encode(PseudoSample(number=0, image=np.zeros((1, 1, 3), dtype), label=0))
