"""Views: randomness, invariants of weak and strong views, and their operations."""

import pytest
import torch

from dist_tl.config import StrictModel, validate
from dist_tl.datasets import augment
from dist_tl.datasets.augment import apply_operation, cut_out, shift, warp
from dist_tl.datasets.digits import DigitsConfig
from dist_tl.datasets.spec import load_images
from dist_tl.datasets.views import PRESETS, Views, ViewsConfig
from dist_tl.errors import ConfigError

OPERATIONS = [*augment.GEOMETRIC, *augment.COLOUR]


class Job(StrictModel):
    views: ViewsConfig


def views_of(views):
    return Views(validate(Job, {"views": views}, source="job").views)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=7):
    return torch.rand(*shape, generator=seeded(seed)) * 2.0 - 1.0


@pytest.mark.parametrize("kind", ["digits", "natural"])
@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (3, 3, 32, 32), (2, 3, 7, 12), (0, 3, 8, 8)])
def test_views_keep_shape_dtype_and_range(kind, shape):
    views, images = views_of(kind), noise(*shape)
    for view in (views.weak(images, seeded()), views.strong(images, seeded())):
        assert view.shape == images.shape
        assert view.dtype == torch.float32
        assert ((view >= -1.0) & (view <= 1.0)).all()


def test_views_of_images_of_224_pixels_keep_the_range():
    view = views_of("natural").strong(noise(2, 3, 224, 224), seeded())
    assert view.shape == (2, 3, 224, 224)
    assert view.abs().max() <= 1.0


@pytest.mark.parametrize("kind", ["digits", "natural"])
@pytest.mark.parametrize("strength", ["weak", "strong"])
def test_the_same_seed_gives_the_same_views_and_another_does_not(kind, strength):
    draw, images = getattr(views_of(kind), strength), noise(6, 3, 16, 16)
    assert torch.equal(draw(images, seeded(3)), draw(images, seeded(3)))
    assert not torch.equal(draw(images, seeded(3)), draw(images, seeded(4)))


@pytest.mark.parametrize("kind", ["digits", "natural"])
@pytest.mark.parametrize("strength", ["weak", "strong"])
def test_every_image_of_a_batch_gets_its_own_view(kind, strength):
    same = noise(1, 3, 16, 16).expand(16, -1, -1, -1)
    view = getattr(views_of(kind), strength)(same, seeded())
    # 9 shifts of a digit and 50 of a photograph: most of 16 differ from the first.
    assert sum(not torch.equal(view[0], other) for other in view[1:]) >= 8


@pytest.mark.parametrize("strength", ["weak", "strong"])
def test_no_augmentation_returns_the_same_tensor_and_draws_nothing(strength):
    rng, images = seeded(), noise(4, 1, 8, 8)
    before = rng.get_state()
    assert getattr(views_of("none"), strength)(images, rng) is images
    assert torch.equal(rng.get_state(), before)


def test_input_images_are_not_modified():
    images = noise(8, 3, 16, 16)
    before = images.clone()
    views_of("natural").strong(images, seeded())
    views_of({"operations": OPERATIONS, "num_operations": 2}).strong(images, seeded())
    assert torch.equal(images, before)


def test_the_global_generator_is_not_used():
    before = torch.get_rng_state()
    views_of("natural").strong(noise(4, 3, 8, 8), seeded())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["digits", "natural"])
def test_images_may_be_on_another_device_than_the_generator(kind):
    images = torch.empty(4, 3, 16, 16, device="meta")
    assert views_of(kind).strong(images, seeded()).device.type == "meta"
    assert views_of(kind).weak(images, seeded()).shape == images.shape


@pytest.mark.parametrize("bad", [torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_other_shapes_and_dtypes_are_rejected(bad):
    with pytest.raises(ValueError, match="expected floating images"):
        views_of("natural").strong(bad, seeded())


# Weak views.


def test_a_weak_digit_is_shifted_by_at_most_one_pixel_and_filled_with_black():
    images = noise(200, 1, 8, 8)
    weak = views_of("digits").weak(images, seeded())
    shifts = set()
    for image, view in zip(images, weak, strict=True):
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                shifted = torch.full((1, 10, 10), -1.0)
                shifted[:, 1 + down : 9 + down, 1 + right : 9 + right] = image
                if torch.equal(view, shifted[:, 1:9, 1:9]):
                    shifts.add((down, right))
    assert len(shifts) == 9


def test_a_flip_only_mirrors_about_half_of_the_images():
    images = noise(200, 3, 6, 6)
    weak = views_of({"flip": True}).weak(images, seeded())
    mirrored = [torch.equal(v, i.flip(-1)) for i, v in zip(images, weak, strict=True)]
    kept = [torch.equal(v, i) for i, v in zip(images, weak, strict=True)]
    assert sum(mirrored) + sum(kept) == 200
    assert 70 <= sum(mirrored) <= 130


def test_natural_views_flip_and_digits_do_not():
    assert views_of("natural").config.flip
    assert not views_of("digits").config.flip


@pytest.mark.parametrize(
    ("fill", "row"), [(0.5, [0.5, 0.5, 0, 1]), ("edge", [0, 0, 0, 1]), ("reflect", [2, 1, 0, 1])]
)
def test_pixels_from_outside_the_image_are_the_fill(fill, row):
    image = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    two, none = torch.tensor([2]), torch.tensor([0])
    shifted = shift(image, none, two, torch.tensor([False]), fill=fill)
    assert shifted[0, 0].tolist() == [row] * 4
    shifted = shift(image.transpose(2, 3), two, none, torch.tensor([True]), fill=fill)
    assert shifted[0, 0, :, 0].tolist() == row


def test_a_reflected_shift_takes_every_pixel_from_the_image_at_any_size():
    for side in (1, 2, 3, 8):
        images = noise(30, 1, side, side) + 5.0
        shifted = views_of({"max_shift": 0.5}).weak(images, seeded())
        assert set(shifted.flatten().tolist()) <= set(images.flatten().tolist())


# Operations.


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_an_operation_of_amount_zero_changes_nothing(name, channels):
    images = noise(2, channels, 9, 12)
    result = apply_operation(name, images, torch.zeros(2), fill="edge")
    torch.testing.assert_close(result, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_uses_the_amount_of_each_image(name):
    images, amount = noise(3, 3, 9, 12), torch.tensor([0.9, 0.0, -0.7])
    together = apply_operation(name, images, amount, fill=-1.0)
    for i in range(3):
        alone = apply_operation(name, images[i : i + 1], amount[i : i + 1], fill=-1.0)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)
    assert (together[0] - images[0]).abs().max() > 0.05


def test_every_configurable_operation_exists():
    names = {name for preset in PRESETS.values() for name in preset.get("operations", ())}
    assert names <= set(OPERATIONS)
    for name in OPERATIONS:
        views_of({"operations": [name], "num_operations": 1}).strong(noise(2, 3, 8, 8), seeded())


def test_a_rotation_by_90_degrees_is_exact_on_squares_and_preserves_shapes_otherwise():
    rotation = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
    square = noise(1, 1, 6, 6)
    rotated = warp(square, rotation, torch.zeros(1, 2), fill=-1.0)
    torch.testing.assert_close(rotated, square.rot90(-1, (2, 3)).flip(2).flip(3), atol=1e-5, rtol=0)

    # A bar of 4 x 1 pixels in the middle of a wide image becomes one of 1 x 4.
    bar = torch.full((1, 1, 7, 15), -1.0)
    bar[0, 0, 3, 6:9] = 1.0
    expected = torch.full((1, 1, 7, 15), -1.0)
    expected[0, 0, 2:5, 7] = 1.0
    rotated = warp(bar, rotation, torch.zeros(1, 2), fill=-1.0)
    torch.testing.assert_close(rotated, expected, atol=1e-4, rtol=0)


def test_a_warp_uses_its_fill():
    away = torch.tensor([[1.0, 0.0]])
    warped = warp(noise(1, 3, 4, 4), torch.eye(2)[None], away, fill=0.25)
    torch.testing.assert_close(warped, torch.full((1, 3, 4, 4), 0.25))


def test_brightness_contrast_and_saturation_have_the_expected_limits():
    images, low = noise(1, 3, 6, 6), torch.tensor([-1.0])
    black = apply_operation("brightness", images, low, fill=0.0)
    torch.testing.assert_close(black, -1.0 + 0.1 * (images + 1.0))
    flat = apply_operation("contrast", images, low, fill=0.0)
    assert flat.std() < 0.11 * images.std() + 1e-6
    gray = apply_operation("saturation", images, low, fill=0.0)
    assert gray.std(dim=1).mean() < 0.11 * images.std(dim=1).mean()
    one_channel = noise(1, 1, 6, 6)
    assert torch.equal(apply_operation("saturation", one_channel, low, fill=0.0), one_channel)


def test_posterize_keeps_16_levels_and_solarize_inverts():
    images, full = noise(1, 1, 64, 64), torch.tensor([1.0])
    assert len(apply_operation("posterize", images, full, fill=0.0).unique()) == 16
    torch.testing.assert_close(apply_operation("solarize", images, full, fill=0.0), -images)


def test_sharpness_does_not_change_flat_images():
    flat = torch.full((1, 3, 5, 5), 0.3)
    torch.testing.assert_close(apply_operation("sharpness", flat, torch.ones(1), fill=0.0), flat)


# Strong views.


def test_a_strong_view_applies_different_operations_to_one_image(monkeypatch):
    applied = []

    def record(name, images, amount, *, fill):
        applied.extend((name, int(row)) for row in images[:, 0, 0, 0])
        assert amount.abs().max() <= 0.5
        return images

    monkeypatch.setattr("dist_tl.datasets.views.apply_operation", record)
    views = views_of({"operations": OPERATIONS, "num_operations": 3, "magnitude": 0.5})
    numbered = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 1, 2, 2)
    views.strong(numbered, seeded())
    assert len(applied) == len(set(applied)) == 120
    assert {name for name, _ in applied} == set(OPERATIONS)


def test_noise_has_the_configured_standard_deviation():
    view = views_of({"noise_std": 0.1}).strong(torch.zeros(10, 1, 50, 50), seeded())
    assert view.std().item() == pytest.approx(0.1, rel=0.02)
    assert abs(view.mean().item()) < 0.002


def test_a_cut_out_is_one_square_of_at_most_the_configured_side():
    images = torch.full((100, 1, 8, 8), 0.5)
    view = views_of({"cutout": 0.375, "fill": -1.0}).strong(images, seeded())
    assert set(view.unique().tolist()) == {-1.0, 0.5}
    area = (view == -1.0).sum(dim=(1, 2, 3))
    assert area.min() >= 1
    assert area.max() == 9
    full = cut_out(images[:1], torch.tensor([4]), torch.tensor([2]), torch.tensor([3]), value=-1.0)
    assert (full[0, 0, 3:6, 1:4] == -1.0).all()
    assert (full == -1.0).sum() == 9


def test_a_strong_view_of_a_digit_is_closest_to_its_own_weak_view():
    digits = load_images(DigitsConfig(limit=200)).tensor()
    views = views_of("digits")
    # The same seed: a strong view starts with the shifts of the weak one.
    weak, strong = views.weak(digits, seeded()), views.strong(digits, seeded())
    nearest = torch.cdist(strong.flatten(1), weak.flatten(1)).argmin(dim=1)
    assert (nearest == torch.arange(200)).float().mean() > 0.97


# Configuration.


def test_fields_override_the_preset():
    config = views_of({"kind": "natural", "flip": False, "fill": 0}).config
    assert not config.flip
    assert config.fill == 0.0
    assert config.cutout == PRESETS["natural"]["cutout"]


def test_resolved_views_round_trip():
    for kind in PRESETS:
        config = views_of(kind).config
        dumped = {"views": config.model_dump(mode="json")}
        assert validate(Job, dumped, source="job").views == config


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ("digit", "'none', 'digits' or 'natural', got 'digit'"),
        (3, "views"),
        ({"kind": ["none"]}, "views.kind"),
        ({"flipp": True}, "did you mean 'flip'"),
        ({"num_operations": 1}, "1 is more than the 0 operations"),
        ({"operations": ["rotate", "rotate"]}, "listed twice"),
        ({"operations": ["spin"]}, "views.operations"),
        ({"fill": 2.0}, r"pixel value in \[-1, 1\], got 2.0"),
        ({"max_shift": 0.6}, "less than or equal to 0.5"),
    ],
)
def test_invalid_views_are_rejected(views, message):
    with pytest.raises(ConfigError, match=message):
        views_of(views)
