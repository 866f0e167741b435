"""Conversion between uint8 and float pixels, and labelled data sets in memory."""

import numpy as np
import pytest
import torch

from dist_tl.datasets.images import LabelledImages, to_float, to_uint8
from dist_tl.errors import NumericsError


def every_level():
    """Returns all 256 levels at distinct positions of a 3-channel image."""
    levels = np.arange(256, dtype=np.uint8)
    return np.stack([levels, levels[::-1], np.roll(levels, 7)], axis=-1).reshape(1, 16, 16, 3)


def test_every_level_round_trips():
    np.testing.assert_array_equal(to_uint8(to_float(every_level())), every_level())


def test_the_mapping_is_x_over_127_5_minus_1_with_channels_first():
    images = every_level()
    mapped = to_float(images)
    assert mapped.dtype == torch.float32
    assert mapped.shape == (1, 3, 16, 16)
    assert mapped[0, 2, 1, 3].item() == pytest.approx(images[0, 1, 3, 2] / 127.5 - 1.0, abs=1e-6)
    assert (mapped.min().item(), mapped.max().item()) == (-1.0, 1.0)


def test_values_are_clamped_and_rounded_to_the_nearest_level():
    values = torch.tensor([-1.7, 1.01, 0.0 + 0.3 / 127.5]).view(1, 1, 1, 3)
    assert to_uint8(values).ravel().tolist() == [0, 255, 128]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_error_of_a_non_finite_pixel_names_the_image(bad):
    images = torch.zeros(4, 1, 2, 2)
    images[2, 0, 1, 1] = bad
    with pytest.raises(NumericsError, match="image 2 of 4"):
        to_uint8(images)


@pytest.mark.parametrize("dtype", [np.float32])
def test_invalid_dtypes_and_shapes_are_rejected(dtype):
    with pytest.raises(ValueError, match="expected uint8"):
        to_float(np.zeros((1, 2, 2, 1), dtype))
    with pytest.raises(ValueError, match="expected floating"):
        to_uint8(torch.zeros(2, 2))


def test_empty_batches_are_converted():
    assert to_float(np.zeros((0, 4, 5, 3), dtype=np.uint8)).shape == (0, 3, 4, 5)
    assert to_uint8(torch.zeros(0, 3, 4, 5)).shape == (0, 4, 5, 3)


def test_a_subset_keeps_order_labels_and_class_names():
    data = LabelledImages(np.repeat(every_level(), 3, axis=0), np.array([0, 1, 2]), ("a", "b", "c"))
    subset = data.subset([2, 0])
    assert subset.labels.tolist() == [2, 0]
    assert (len(subset), subset.num_classes, subset.image_shape) == (2, 3, (3, 16, 16))
    assert torch.equal(data.tensor([2, 0]), subset.tensor())
    assert torch.equal(data.tensor()[1], data.tensor([1])[0])


def test_the_tensor_is_a_copy():
    data = LabelledImages(np.zeros((1, 2, 2, 1), np.uint8), np.array([0]), ("a",))
    data.tensor().fill_(1.0)
    assert data.images.max() == 0


def test_identical_pictures_are_found_by_their_pixels_and_shape():
    images = np.array([1, 2, 1, 3, 2, 1], np.uint8)[:, None, None, None].repeat(4, axis=1)
    data = LabelledImages(images, np.zeros(6, np.int64), ("a",), names=tuple("uvwxyz"))
    assert data.first_copy.tolist() == [0, 1, 0, 3, 1, 0]
    assert data.distinct.tolist() == [0, 1, 3]
    assert data.subset([5, 4, 2]).first_copy.tolist() == [0, 1, 0]
    assert list(data.subset([5, 4, 2]).names) == ["z", "y", "w"]
    turned = LabelledImages(images.transpose(0, 2, 1, 3), data.labels, ("a",))
    assert not set(turned.digests) & set(data.digests), "same bytes, other shape"
