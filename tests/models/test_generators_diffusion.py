"""The diffusion model: conditions, seeds, the loss in closed form, learning, and files."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from dist_tl.config import validate
from dist_tl.errors import ConfigError, NumericsError
from dist_tl.models.generators.diffusion import (
    ClassDiffusion,
    DiffusionConfig,
    loss_weight,
    prediction_target,
)
from dist_tl.seeds import row_rngs, torch_rng

NUM_CLASSES = 3
SHAPE = (1, 4, 4)


def build(seed=0, shape=SHAPE, num_classes=NUM_CLASSES, **options):
    """Builds a tiny model whose output depends on its input, unlike that of a new model."""
    settings = {"channels": (8, 8), "num_steps": 3} | options
    model = ClassDiffusion(
        DiffusionConfig(**settings),
        num_classes=num_classes,
        image_shape=shape,
        rng=torch_rng(seed, "weights"),
    )
    nn.init.normal_(model.unet.conv_out.weight, std=0.1, generator=torch_rng(seed, "last layer"))
    return model


def one_hot(labels):
    return nn.functional.one_hot(labels, NUM_CLASSES).float()


def mixtures(num_rows):
    return torch.randn(num_rows, NUM_CLASSES, generator=torch_rng(0, "mixtures")).softmax(dim=1)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_one_hot_conditions_equal_integer_labels_exactly(guidance_scale):
    model, labels = build(guidance_scale=guidance_scale), torch.tensor([0, 2, 1, 2])
    soft = model.sample(one_hot(labels), rng=row_rngs(0, "z", range(4)))
    hard = model.sample_classes(labels, rng=row_rngs(0, "z", range(4)))
    assert torch.equal(soft, hard)
    assert not torch.equal(soft[1], soft[3])  # same class, other noise


def test_a_sample_depends_on_its_condition_and_its_own_generator_only():
    model, condition = build(guidance_scale=1.5), mixtures(5)
    together = model.sample(condition, rng=row_rngs(0, "z", range(5)))
    alone = model.sample(condition[3:4], rng=row_rngs(0, "z", [3]))
    torch.testing.assert_close(together[3:4], alone, atol=1e-5, rtol=0)
    others = model.sample(condition, rng=row_rngs(1, "z", [0, 1, 2]) + row_rngs(0, "z", [3, 4]))
    assert torch.equal(together[3:], others[3:])
    assert not torch.equal(together[0], others[0])


def test_the_condition_changes_the_image():
    model = build()
    first, second = (
        model.sample_classes(torch.tensor([label]), rng=row_rngs(0, "z", [0])) for label in (0, 1)
    )
    assert (first - second).abs().max() > 1e-3


def test_mixing_classes_that_share_an_embedding_changes_nothing():
    model = build()
    with torch.no_grad():
        model.label_embedding.weight[1] = model.label_embedding.weight[0]
    condition = torch.tensor([[0.3, 0.7, 0.0], [1.0, 0.0, 0.0]])
    images = model.sample(condition, rng=row_rngs(0, "z", [4, 4]))
    torch.testing.assert_close(images[0], images[1], atol=1e-5, rtol=0)


def test_images_are_float32_between_black_and_white():
    images = build(guidance_scale=3.0).sample(mixtures(4), rng=row_rngs(0, "z", range(4)))
    assert images.shape == (4, *SHAPE)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1.0
    assert not images.requires_grad


def test_no_rows_give_no_images():
    assert build().sample(torch.empty(0, NUM_CLASSES), rng=[]).shape == (0, *SHAPE)


def test_building_training_and_sampling_do_not_change_the_global_generator():
    before = torch.get_rng_state()
    model = build(attention=True)
    model.loss(torch.zeros(2, *SHAPE), torch.tensor([0, 1]), rng=torch.Generator())
    model.sample(mixtures(2), rng=row_rngs(0, "z", range(2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_does_not_depend_on_the_mode_and_restores_it():
    model = build(attention=True)
    samples = []
    for training in (True, False):
        samples.append(model.train(training).sample(mixtures(2), rng=row_rngs(0, "z", range(2))))
        assert model.training is training
    assert torch.equal(*samples)


def test_sampling_changes_no_weight():
    model = build(guidance_scale=2.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.sample(mixtures(2), rng=row_rngs(0, "z", range(2)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_initial_weights_depend_on_the_generator_only():
    one, same, other = (build(seed).label_embedding.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("prediction", ["v", "noise", "image"])
def test_the_loss_of_a_zero_prediction_is_the_power_of_its_target(prediction):
    model = build(prediction=prediction, snr_clip=None)
    nn.init.zeros_(model.unet.conv_out.weight)
    # Pixels of +-1 have the power of the noise, so v has that power at every noise level.
    images = torch.randn(600, *SHAPE, generator=torch_rng(0, "signs")).sign()
    loss = model.loss(images, torch.zeros(600).long(), rng=torch_rng(0, "noise"))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    # 9600 squares of standard normal numbers: a standard error of sqrt(2 / 9600) = 0.014.
    assert loss.item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("snr_clip", [0.5, 5.0])
def test_every_prediction_gives_an_image_error_the_same_weight(snr_clip):
    rng = torch_rng(0, "images")
    image, noise = torch.randn(2, 50, generator=rng, dtype=torch.float64)
    signal = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    noisy = signal.sqrt() * image + (1 - signal).sqrt() * noise
    guess = image + 0.3
    implied_noise = (noisy - signal.sqrt() * guess) / (1 - signal).sqrt()
    for prediction in ("v", "noise", "image"):
        config = DiffusionConfig(prediction=prediction, snr_clip=snr_clip)
        error = prediction_target(prediction, guess, implied_noise, signal) - prediction_target(
            prediction, image, noise, signal
        )
        expected = (signal / (1 - signal)).clamp(max=snr_clip) * 0.3**2
        torch.testing.assert_close(loss_weight(config, signal) * error.square(), expected)


def test_the_loss_depends_on_its_generator_only():
    model, images, labels = build(), torch.zeros(4, *SHAPE), torch.tensor([0, 1, 2, 0])
    first, again, other = (model.loss(images, labels, rng=torch_rng(s, "noise")) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(first, model(images, labels, rng=torch_rng(0, "noise")))
    assert not torch.equal(first, other)


def test_only_dropped_labels_train_the_no_class_embedding():
    for label_dropout, learns in ((0.0, False), (0.9, True)):
        model = build(label_dropout=label_dropout)
        images, labels = torch.ones(8, *SHAPE), torch.zeros(8).long()
        model.loss(images, labels, rng=torch_rng(0, "noise")).backward()
        assert model.label_embedding.weight.grad[NUM_CLASSES].any() == learns


def test_a_trained_model_generates_the_requested_class():
    model = build(num_classes=2, num_steps=5, guidance_scale=1.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    labels = torch.arange(2).repeat(16)
    images = (labels * 2.0 - 1.0)[:, None, None, None].expand(-1, *SHAPE) * 0.8
    for step in range(60):
        optimizer.zero_grad()
        model.loss(images, labels, rng=torch_rng(0, "noise", step)).backward()
        optimizer.step()
    brightness = model.sample_classes(labels, rng=row_rngs(0, "z", range(32))).mean(dim=(1, 2, 3))
    assert (brightness.sign() == labels * 2 - 1).all()


def test_saving_and_loading_is_bit_exact():
    model = build(guidance_scale=1.5, attention=True, prediction="noise")
    files = model.to_files()
    assert set(files) == {"model.safetensors", "config.json"}
    loaded = ClassDiffusion.from_files(files)
    assert loaded.config == model.config
    assert (loaded.num_classes, loaded.image_shape) == (NUM_CLASSES, SHAPE)
    saved = model.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in loaded.state_dict().items())
    samples = [m.sample(mixtures(2), rng=row_rngs(0, "z", range(2))) for m in (model, loaded)]
    assert torch.equal(*samples)
    assert loaded.to_files() == files


def without_a_weight(files):
    tensors = safetensors.torch.load(files["model.safetensors"])
    tensors.pop("label_embedding.weight")
    return safetensors.torch.save(tensors)


def with_another_width(files):
    description = json.loads(files["config.json"])
    description["generator"]["channels"] = [16, 16]
    return json.dumps(description).encode()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", lambda files: b"no tensors"),
        ("model.safetensors", lambda files: files["model.safetensors"][:-9]),
        ("model.safetensors", without_a_weight),
        ("config.json", with_another_width),
        ("config.json", lambda files: b"{}"),
        ("config.json", lambda files: b"[1]"),
        ("config.json", lambda files: b"\xff"),
    ],
)
def test_damaged_files_are_rejected(name, change):
    files = build().to_files()
    with pytest.raises(ConfigError, match="generator"):
        ClassDiffusion.from_files(files | {name: change(files)})


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"missing \['config.json'\]"):
        ClassDiffusion.from_files({"model.safetensors": b""})


def test_a_row_that_is_not_finite_is_named():
    model = build()
    with torch.no_grad():
        model.label_embedding.weight[1] = float("nan")
    with pytest.raises(NumericsError, match="row 2 of 4"):
        model.sample_classes(torch.tensor([0, 2, 1, 0]), rng=row_rngs(0, "z", range(4)))


def test_batches_that_do_not_fit_are_rejected():
    model, rng = build(), torch.Generator()
    with pytest.raises(ValueError, match=r"expected images \(N, 1, 4, 4\)"):
        model.loss(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), rng=rng)
    with pytest.raises(ValueError, match=r"expected 0\.\.2, got 3"):
        model.loss(torch.zeros(1, *SHAPE), torch.tensor([3]), rng=rng)
    with pytest.raises(ConfigError, match="sum to 1"):
        model.sample(torch.ones(1, NUM_CLASSES), rng=[rng])
    with pytest.raises(ValueError, match="each of 2 rows"):
        model.sample(mixtures(2), rng=[rng])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": [12]}, "multiples of 8"),
        ({"channels": []}, "at least 1 item"),
        ({"guidance_scale": 2.0, "label_dropout": 0.0}, "needs label_dropout"),
        ({"chanels": [8]}, "did you mean 'channels'"),
    ],
)
def test_invalid_configurations_are_rejected(options, message):
    with pytest.raises(ConfigError, match=message):
        validate(DiffusionConfig, options, source="job")


@pytest.mark.parametrize("sizes", [{"shape": (1, 5, 4)}, {"shape": (4, 4)}, {"num_classes": 1}])
def test_sizes_that_do_not_fit_the_network_are_rejected(sizes):
    with pytest.raises(ConfigError, match="expected"):
        build(**sizes)


def test_larger_colour_images_work_in_bfloat16_with_a_float32_loss():
    model = build(shape=(3, 32, 32), channels=(8, 16, 16), attention=True).to(torch.bfloat16)
    loss = model.loss(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]), rng=torch.Generator())
    assert loss.dtype == torch.float32
    images = model.sample(mixtures(2), rng=row_rngs(0, "z", range(2)))
    assert images.shape == (2, 3, 32, 32)
    assert images.dtype == torch.float32
