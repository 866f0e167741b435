"""Domain shifts of images, mixtures of domains, and parts divided among several domains."""

import json

import numpy as np
import pytest
from PIL import Image

from dist_tl.config import StrictModel, fingerprint, parse_yaml, validate
from dist_tl.datasets.domains import DomainConfig, change_domain
from dist_tl.datasets.spec import DataConfig, MixtureConfig, load_images
from dist_tl.errors import ConfigError


class Job(StrictModel):
    data: DataConfig


def config_of(text):
    return validate(Job, parse_yaml(text, source="job"), source="job").data


def load(text, seed=0):
    return load_images(config_of(f"data: {text}"), seed=seed)


def some_images(height=6, width=6, channels=1, rows=4):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (rows, height, width, channels), dtype=np.uint8)


def changed(images, *, numbers=None, **config):
    return change_domain(images, DomainConfig(**config), numbers=numbers or range(len(images)))


# Single steps.


@pytest.mark.parametrize("channels", [1, 3])
def test_rotations_compose(channels):
    images = some_images(channels=channels)
    twice = changed(changed(images, rotate=90), rotate=90)
    assert np.array_equal(twice, changed(images, rotate=180))
    assert np.array_equal(changed(changed(twice, rotate=90), rotate=90), images)
    assert np.array_equal(changed(changed(images, rotate=90), rotate=270), images)


def test_rotations_are_counterclockwise_and_swap_the_sides():
    images = some_images(height=2, width=3)
    rotated = changed(images, rotate=90)
    assert rotated.shape == (4, 3, 2, 1)
    assert np.array_equal(rotated[:, 0, 0], images[:, 0, -1])  # upper right becomes upper left


@pytest.mark.parametrize("step", [{"invert": True}, {"mirror": True}])
def test_inversion_and_mirroring_are_their_own_inverse(step):
    images = some_images(channels=3)
    once = changed(images, **step)
    assert not np.array_equal(once, images)
    assert np.array_equal(changed(once, **step), images)


def test_mirroring_swaps_left_and_right_and_inversion_subtracts_from_white():
    images = some_images()
    assert np.array_equal(changed(images, mirror=True)[:, :, 0], images[:, :, -1])
    assert (changed(images, invert=True).astype(int) + images == 255).all()


def test_steps_are_applied_in_the_order_rotate_mirror_invert():
    images = some_images()
    expected = images
    for step in ({"rotate": 90}, {"mirror": True}, {"invert": True}):
        expected = changed(expected, **step)
    assert np.array_equal(changed(images, rotate=90, mirror=True, invert=True), expected)


def test_the_default_domain_is_the_identity_and_images_are_never_modified():
    images = some_images()
    before = images.copy()
    assert np.array_equal(changed(images), images)
    changed(images, scale=0.5, rotate=90, invert=True, noise=0.5)[:] = 0
    assert np.array_equal(images, before)


# Noise.


def test_noise_depends_on_the_number_of_the_image_only():
    images = some_images(rows=5)
    noisy = changed(images, noise=0.2, numbers=[10, 11, 12, 13, 14])
    part = changed(images[[3, 1]], noise=0.2, numbers=[13, 11])
    assert np.array_equal(part, noisy[[3, 1]])
    same = np.repeat(images[:1], 2, axis=0)
    one, two = changed(same, noise=0.2, numbers=[0, 1])
    assert not np.array_equal(one, two)
    assert not np.array_equal(changed(images, noise=0.2, seed=1), changed(images, noise=0.2))


def test_noise_does_not_depend_on_limits_and_parts():
    noisy = "{source: digits, classes: [3], domain: {noise: 0.2}%s}"
    all_images = {image.tobytes() for image in load(noisy % "").images}
    assert all(image.tobytes() in all_images for image in load(noisy % ", limit: 7").images)
    part = load(noisy % ", part: {index: 1, of: 3}")
    assert all(image.tobytes() in all_images for image in part.images)


def test_noise_has_the_configured_standard_deviation():
    images = np.full((40, 20, 20, 1), 128, dtype=np.uint8)
    noise = changed(images, noise=0.1).astype(float) - 128
    standard_error = 25.5 / np.sqrt(2 * noise.size)
    assert noise.std() == pytest.approx(25.5, abs=3 * standard_error)
    assert noise.mean() == pytest.approx(0.0, abs=3 * 25.5 / np.sqrt(noise.size))


# Shrunk images.


@pytest.mark.parametrize("scale", [0.01, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("height", "width", "channels"), [(8, 8, 1), (5, 9, 3), (1, 1, 1)])
def test_shrunk_images_keep_their_shape(scale, height, width, channels):
    images = some_images(height, width, channels)
    shrunk = changed(images, scale=scale)
    assert shrunk.shape == images.shape
    assert shrunk.dtype == np.uint8


def test_a_shrunk_image_is_centred_on_black():
    images = some_images(8, 8) // 2 + 100
    shrunk = changed(images, scale=0.5)
    small = Image.fromarray(images[0, :, :, 0]).resize((4, 4))
    assert np.array_equal(shrunk[0, 2:6, 2:6, 0], np.asarray(small))
    assert (shrunk[:, 2:6, 2:6] >= 100).all()
    shrunk[:, 2:6, 2:6] = 0
    assert not shrunk.any()


@pytest.mark.parametrize(
    "invalid", ["scale: 0", "scale: 1.5", "rotate: 45", "noise: -0.1", "turn: 90"]
)
def test_the_error_of_an_invalid_domain_names_the_field(invalid):
    field = invalid.partition(":")[0]
    with pytest.raises(ConfigError, match=rf"domain\.{field}"):
        load(f"{{source: digits, domain: {{{invalid}}}}}")


# Mixtures.

MIXTURE = """
  source: mixture
  domains:
    plain: {source: digits, part: {index: 0, of: 2}, limit: 40}
    inverted: {source: digits, part: {index: 1, of: 2}, limit: 30, domain: {invert: true}}
"""


def test_a_mixture_contains_the_images_of_its_domains_with_domain_indices():
    mixed = load(MIXTURE)
    assert mixed.domain_names == ("inverted", "plain")
    assert mixed.domains is not None
    assert np.bincount(mixed.domains).tolist() == [30, 40]
    inverted = load("{source: digits, part: {index: 1, of: 2}, limit: 30, domain: {invert: true}}")
    assert np.array_equal(mixed.images[mixed.domains == 0], inverted.images)
    assert np.array_equal(mixed.labels[mixed.domains == 0], inverted.labels)


def test_a_subset_of_a_mixture_keeps_its_domains():
    mixed = load(MIXTURE)
    order = np.array([69, 0, 35, 5])
    part = mixed.subset(order).subset([2, 0])
    assert part.domain_names == mixed.domain_names
    assert mixed.domains is not None
    assert part.domains is not None
    assert part.domains.tolist() == mixed.domains[[35, 69]].tolist()
    assert np.array_equal(part.images, mixed.images[[35, 69]])
    assert load("{source: digits, limit: 10}").subset([1]).domains is None


def test_the_order_of_keys_changes_neither_the_images_nor_the_fingerprint():
    head, plain, inverted = MIXTURE.strip("\n").rsplit("\n", 2)
    other = f"\n{head}\n{inverted}\n{plain}\n"
    one, two = load(MIXTURE), load(other)
    for field in ("images", "labels", "domains"):
        assert np.array_equal(getattr(one, field), getattr(two, field))
    assert one.domain_names == two.domain_names
    left, right = (config_of(f"data: {text}") for text in (MIXTURE, other))
    assert isinstance(left, MixtureConfig)
    assert isinstance(right, MixtureConfig)
    assert list(left.domains) != list(right.domains)
    assert fingerprint(left) == fingerprint(right)
    again = validate(Job, {"data": json.loads(left.model_dump_json())}, source="job").data
    assert again == left


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{source: digits, classes: [0, 1]}", "a and b have different classes"),
        ("{source: digits, classes: [1, 0, 2]}", "a and b have different classes"),
        ("{source: digits, classes: [0, 1, 2], size: 16}", r"a .*\(1, 8, 8\), those of b \(1, 16"),
        ("{source: digits, classes: [0, 1, 2], channels: 3}", r"b \(3, 8, 8\); set size and chan"),
    ],
)
def test_domains_with_different_classes_or_shapes_are_rejected(second, message):
    first = "{source: digits, classes: [0, 1, 2]}"
    with pytest.raises(ConfigError, match=f"mixture: .*{message}"):
        load(f"{{source: mixture, domains: {{b: {second}, a: {first}}}}}")


@pytest.mark.parametrize(
    "domains", ["{}", "{a: {source: mixture, domains: {b: {source: digits}}}}", "[digits]"]
)
def test_empty_and_nested_mixtures_are_rejected(domains):
    with pytest.raises(ConfigError, match=r"data\.domains"):
        load(f"{{source: mixture, domains: {domains}}}")


# Several parts at once.


def rows(data):
    return [image.tobytes() for image in data.images]


def test_several_parts_are_disjoint_from_the_rest_and_complete_together():
    part = "{source: digits, part: {index: %s, of: 5}}"
    some, others = rows(load(part % "[0, 3]")), rows(load(part % "[1, 2, 4]"))
    assert not set(some) & set(others)
    assert sorted([*some, *others]) == sorted(rows(load("{source: digits}")))
    assert sorted(some) == sorted([*rows(load(part % 0)), *rows(load(part % 3))])


def test_parts_are_a_number_or_a_list_in_any_order():
    part = "{source: digits, part: {index: %s, of: 5}}"
    assert rows(load(part % 3)) == rows(load(part % "[3]"))
    assert (
        rows(load(part % "[3, 0]")) == rows(load(part % "[0, 3]")) == rows(load(part % "[0,0,3]"))
    )


@pytest.mark.parametrize("index", ["5", "-1", "[0, 5]", "[]"])
def test_invalid_parts_are_rejected(index):
    with pytest.raises(ConfigError, match=r"part: index .* of 5 parts: expected 0\.\.4"):
        load(f"{{source: digits, part: {{index: {index}, of: 5}}}}")
