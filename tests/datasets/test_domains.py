"""Domains of the same images, mixtures of them, and parts that several domains share out."""

import json

import numpy as np
import pytest
from PIL import Image

from dist_tl.config import StrictModel, fingerprint, parse_yaml, validate
from dist_tl.datasets.domains import DomainConfig, change_domain
from dist_tl.datasets.spec import DataConfig, load_images
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


# One image after another.


@pytest.mark.parametrize("channels", [1, 3])
def test_two_quarter_turns_are_a_half_turn_and_four_are_none(channels):
    images = some_images(channels=channels)
    twice = changed(changed(images, rotate=90), rotate=90)
    assert np.array_equal(twice, changed(images, rotate=180))
    assert np.array_equal(changed(changed(twice, rotate=90), rotate=90), images)
    assert np.array_equal(changed(changed(images, rotate=90), rotate=270), images)


def test_turns_are_counterclockwise_and_swap_the_sides():
    images = some_images(height=2, width=3)
    turned = changed(images, rotate=90)
    assert turned.shape == (4, 3, 2, 1)
    assert np.array_equal(turned[:, 0, 0], images[:, 0, -1])  # the upper right comes to upper left


@pytest.mark.parametrize("step", [{"invert": True}, {"mirror": True}])
def test_what_is_inverted_or_mirrored_twice_is_what_it_was(step):
    images = some_images(channels=3)
    once = changed(images, **step)
    assert not np.array_equal(once, images)
    assert np.array_equal(changed(once, **step), images)


def test_a_mirror_swaps_left_and_right_and_an_inverted_pixel_adds_up_to_white():
    images = some_images()
    assert np.array_equal(changed(images, mirror=True)[:, :, 0], images[:, :, -1])
    assert (changed(images, invert=True).astype(int) + images == 255).all()


def test_steps_are_taken_in_order_turn_mirror_invert():
    images = some_images()
    expected = images
    for step in ({"rotate": 90}, {"mirror": True}, {"invert": True}):
        expected = changed(expected, **step)
    assert np.array_equal(changed(images, rotate=90, mirror=True, invert=True), expected)


def test_a_domain_that_changes_nothing_gives_the_same_images_and_leaves_them_alone():
    images = some_images()
    before = images.copy()
    assert np.array_equal(changed(images), images)
    changed(images, scale=0.5, rotate=90, invert=True, noise=0.5)[:] = 0
    assert np.array_equal(images, before)


# Noise.


def test_noise_follows_from_an_images_number_and_not_from_what_else_is_loaded():
    images = some_images(rows=5)
    whole = changed(images, noise=0.2, numbers=[10, 11, 12, 13, 14])
    part = changed(images[[3, 1]], noise=0.2, numbers=[13, 11])
    assert np.array_equal(part, whole[[3, 1]])
    same = np.repeat(images[:1], 2, axis=0)
    one, two = changed(same, noise=0.2, numbers=[0, 1])
    assert not np.array_equal(one, two)
    assert not np.array_equal(changed(images, noise=0.2, seed=1), changed(images, noise=0.2))


def test_noise_in_a_loaded_limit_is_that_of_the_whole():
    noisy = "{source: digits, classes: [3], domain: {noise: 0.2}%s}"
    whole = {image.tobytes() for image in load(noisy % "").images}
    assert all(image.tobytes() in whole for image in load(noisy % ", limit: 7").images)
    part = load(noisy % ", part: {index: 1, of: 3}")
    assert all(image.tobytes() in whole for image in part.images)


def test_noise_has_the_deviation_that_was_asked_for():
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


def test_a_shrunk_image_stands_in_the_middle_of_black():
    images = some_images(8, 8) // 2 + 100
    shrunk = changed(images, scale=0.5)
    small = Image.fromarray(images[0, :, :, 0]).resize((4, 4))
    assert np.array_equal(shrunk[0, 2:6, 2:6, 0], np.asarray(small))
    assert (shrunk[:, 2:6, 2:6] >= 100).all()
    shrunk[:, 2:6, 2:6] = 0
    assert not shrunk.any()


@pytest.mark.parametrize(
    "wrong", ["scale: 0", "scale: 1.5", "rotate: 45", "noise: -0.1", "turn: 90"]
)
def test_a_domain_that_cannot_be_is_refused_by_its_field(wrong):
    field = wrong.partition(":")[0]
    with pytest.raises(ConfigError, match=rf"domain\.{field}"):
        load(f"{{source: digits, domain: {{{wrong}}}}}")


# Mixtures.

MIXTURE = """
  source: mixture
  domains:
    plain: {source: digits, part: {index: 0, of: 2}, limit: 40}
    inverted: {source: digits, part: {index: 1, of: 2}, limit: 30, domain: {invert: true}}
"""


def test_a_mixture_has_the_images_of_its_domains_and_knows_which_is_which():
    mixed = load(MIXTURE)
    assert mixed.domain_names == ("inverted", "plain")
    assert np.bincount(mixed.domains).tolist() == [30, 40]
    inverted = load("{source: digits, part: {index: 1, of: 2}, limit: 30, domain: {invert: true}}")
    assert np.array_equal(mixed.images[mixed.domains == 0], inverted.images)
    assert np.array_equal(mixed.labels[mixed.domains == 0], inverted.labels)


def test_a_subset_of_a_mixture_remembers_its_domains():
    mixed = load(MIXTURE)
    order = np.array([69, 0, 35, 5])
    part = mixed.subset(order).subset([2, 0])
    assert part.domain_names == mixed.domain_names
    assert part.domains.tolist() == mixed.domains[[35, 69]].tolist()
    assert np.array_equal(part.images, mixed.images[[35, 69]])
    assert load("{source: digits, limit: 10}").subset([1]).domains is None


def test_the_order_of_keys_in_the_file_changes_neither_the_images_nor_the_fingerprint():
    head, plain, inverted = MIXTURE.strip("\n").rsplit("\n", 2)
    other = f"\n{head}\n{inverted}\n{plain}\n"
    one, two = load(MIXTURE), load(other)
    for field in ("images", "labels", "domains"):
        assert np.array_equal(getattr(one, field), getattr(two, field))
    assert one.domain_names == two.domain_names
    left, right = (config_of(f"data: {text}") for text in (MIXTURE, other))
    assert list(left.domains) != list(right.domains)
    assert fingerprint(left) == fingerprint(right)
    again = validate(Job, {"data": json.loads(left.model_dump_json())}, source="job").data
    assert again == left


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ("{source: digits, classes: [0, 1]}", "a and b have different classes"),
        ("{source: digits, classes: [1, 0, 2]}", "a and b have different classes"),
        ("{source: digits, classes: [0, 1, 2], size: 16}", r"a .*\(1, 8, 8\), those of b \(1, 16"),
        ("{source: digits, classes: [0, 1, 2], channels: 3}", r"b \(3, 8, 8\); set size and chan"),
    ],
)
def test_domains_that_differ_in_classes_or_shape_are_refused(second, told):
    first = "{source: digits, classes: [0, 1, 2]}"
    with pytest.raises(ConfigError, match=f"mixture: .*{told}"):
        load(f"{{source: mixture, domains: {{b: {second}, a: {first}}}}}")


@pytest.mark.parametrize(
    "domains", ["{}", "{a: {source: mixture, domains: {b: {source: digits}}}}", "[digits]"]
)
def test_a_mixture_of_nothing_or_of_mixtures_is_refused(domains):
    with pytest.raises(ConfigError, match=r"data\.domains"):
        load(f"{{source: mixture, domains: {domains}}}")


# Several parts at once.


def rows(data):
    return [image.tobytes() for image in data.images]


def test_several_parts_are_disjoint_from_the_rest_and_together_the_whole():
    part = "{source: digits, part: {index: %s, of: 5}}"
    some, others = rows(load(part % "[0, 3]")), rows(load(part % "[1, 2, 4]"))
    assert not set(some) & set(others)
    assert sorted([*some, *others]) == sorted(rows(load("{source: digits}")))
    assert sorted(some) == sorted([*rows(load(part % 0)), *rows(load(part % 3))])


def test_one_part_may_be_written_alone_or_in_a_list_and_order_does_not_matter():
    part = "{source: digits, part: {index: %s, of: 5}}"
    assert rows(load(part % 3)) == rows(load(part % "[3]"))
    assert (
        rows(load(part % "[3, 0]")) == rows(load(part % "[0, 3]")) == rows(load(part % "[0,0,3]"))
    )


@pytest.mark.parametrize("index", ["5", "-1", "[0, 5]", "[]"])
def test_a_part_that_is_not_there_is_refused(index):
    with pytest.raises(ConfigError, match=r"part: index .* of 5 parts: expected 0\.\.4"):
        load(f"{{source: digits, part: {{index: {index}, of: 5}}}}")
