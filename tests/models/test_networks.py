"""ResNet and shared network code: structure, weights, a pretrained trunk under a new head."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

from dist_tl.config import StrictModel, validate
from dist_tl.errors import ConfigError
from dist_tl.models.inputs import InputAdapter, InputConfig, Normalise
from dist_tl.models.networks import (
    NetworkConfig,
    ResNetConfig,
    TransformersConfig,
    build_network,
    parameter_count,
    replace_head,
)

GREY = (1, 8, 8)
VIT = TransformersConfig(
    kind="transformers",
    architecture="vit",
    config={
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": 4,
    },
)


class Job(StrictModel):
    network: NetworkConfig


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def build(config=None, *, num_classes=5, image_shape=GREY, seed=0):
    config = config or ResNetConfig()
    return build_network(config, num_classes=num_classes, image_shape=image_shape, rng=seeded(seed))


def images_of(shape=GREY, count=6, seed=1):
    return torch.rand(count, *shape, generator=seeded(seed)) * 2 - 1


def equal_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_logits_are_the_head_of_the_trunk():
    network, images = build().eval(), images_of()
    features = network.features(images)
    assert features.shape == (6, network.num_features)
    assert torch.equal(network(images), network.head(features))
    assert torch.equal(features, network.trunk(images))


@pytest.mark.parametrize("training", [False, True])
def test_blocks_are_all_residual_blocks_and_then_the_heads_input(training):
    network = build(ResNetConfig(width=4, blocks=(2, 1, 3))).train(training)
    with torch.random.fork_rng():
        *maps, features = network.blocks(images_of())
    sizes = [(4, 8, 8)] * 2 + [(8, 4, 4)] + [(16, 2, 2)] * 3
    assert [tuple(item.shape[1:]) for item in maps] == sizes
    assert features.shape == (6, 16 * 4)
    if not training:
        assert torch.equal(network.head(features), network(images_of()))


def test_blocks_need_one_forward_and_remove_their_hooks():
    network = build()
    calls = []
    network.trunk.stem.register_forward_hook(lambda *_: calls.append(1))
    network.blocks(images_of())
    assert len(calls) == 1
    hooks = [module._forward_hooks for module in network.modules()]
    assert sum(len(registered) for registered in hooks) == 1  # the hook of this test


def test_hooks_are_removed_when_the_forward_raises():
    network = build()
    network.trunk.norm = torch.nn.BatchNorm2d(3)  # the wrong width
    with pytest.raises(RuntimeError):
        network.blocks(images_of())
    assert not any(module._forward_hooks for module in network.modules())


def test_a_block_is_the_shortcut_plus_its_branch():
    network = build(ResNetConfig(width=4, blocks=(1,), pool=1)).eval()
    block = network.trunk.stages[0][0]
    torch.nn.init.zeros_(block.conv2.weight)
    hidden = images_of((4, 8, 8))
    assert torch.equal(block(hidden), hidden)


@pytest.mark.parametrize("config", [ResNetConfig(), VIT], ids=["resnet", "transformers"])
def test_weights_depend_on_the_generator_only(config):
    first = build(config)
    torch.rand(7)  # advances the global generator
    assert equal_states(first, build(config))
    assert not torch.equal(first.head.weight, build(config, seed=1).head.weight)
    trunk, other = (
        next(p for p in build(config, seed=seed).trunk.parameters() if p.ndim == 4)
        for seed in (0, 1)
    )
    assert not torch.equal(trunk, other)


@pytest.mark.parametrize("config", [ResNetConfig(), VIT], ids=["resnet", "transformers"])
def test_building_changes_no_global_generator(config):
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()
    build(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_two_builds_from_one_generator_differ():
    rng = seeded()
    one, two = (
        build_network(ResNetConfig(), num_classes=3, image_shape=GREY, rng=rng) for _ in range(2)
    )
    assert not torch.equal(one.trunk.stem.weight, two.trunk.stem.weight)


def test_a_new_head_leaves_the_pretrained_trunk_unchanged_bit_for_bit():
    source = build(ResNetConfig(width=64), num_classes=7)
    source(images_of())  # updates the running statistics
    torch.nn.init.ones_(source.head.bias)
    old = {key: value.clone() for key, value in source.state_dict().items()}

    target = replace_head(source, 40, seeded(3))

    assert equal_states(source.trunk, target.trunk)
    assert target.head.weight.shape == (40, source.num_features)
    assert target.head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert target.head.weight.mean().item() == pytest.approx(0.0, abs=3e-4)
    assert not target.head.bias.any()
    assert torch.equal(target.head.weight, replace_head(source, 40, seeded(3)).head.weight)
    with torch.no_grad():
        for tensor in target.state_dict().values():
            tensor.add_(1)
    assert all(torch.equal(old[key], value) for key, value in source.state_dict().items())


def test_a_new_head_keeps_mode_dtype_and_frozen_parameters():
    source = build().eval().bfloat16()
    source.trunk.stem.requires_grad_(False)
    target = replace_head(source, 3, seeded())
    assert not target.training
    assert target.head.weight.dtype == torch.bfloat16
    assert not target.trunk.stem.weight.requires_grad


def test_a_network_in_bfloat16_takes_float32_images():
    logits = build().eval().bfloat16()(images_of())
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_group_norm_does_not_depend_on_the_rest_of_the_batch_in_training():
    images = images_of()
    alone = {norm: build(ResNetConfig(norm=norm))(images[:2]) for norm in ("group", "batch")}
    among = {norm: build(ResNetConfig(norm=norm))(images)[:2] for norm in ("group", "batch")}
    torch.testing.assert_close(alone["group"], among["group"])
    assert (alone["batch"] - among["batch"]).abs().max() > 1e-3


def test_pooling_to_four_cells_distinguishes_left_from_right_and_one_cell_does_not():
    # A symmetric stem and a zero block, so that mirroring commutes with everything else.
    left, right = torch.zeros(1, *GREY), torch.zeros(1, *GREY)
    left[..., 2:4, 1] = 1.0
    right[..., 2:4, 6] = 1.0
    for pool, differs in ((1, False), (2, True)):
        network = build(ResNetConfig(width=8, blocks=(1,), pool=pool)).eval()
        torch.nn.init.zeros_(network.trunk.stages[0][0].conv2.weight)
        with torch.no_grad():
            stem = network.trunk.stem.weight
            stem.copy_(stem + stem.flip(-1))
        near = torch.allclose(network.features(left), network.features(right), atol=1e-6)
        assert near is not differs


def test_digits_are_learnt_from_five_labels_a_class():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    train = torch.cat([(labels == c).nonzero()[:5, 0] for c in range(10)])
    network = build(num_classes=10)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    padded = functional.pad(images[train], (1, 1, 1, 1), value=-1.0)
    for step in range(90):
        top, left = step // 3 % 3, step % 3  # every shift by at most one pixel, in turn
        optimizer.zero_grad()
        logits = network(padded[:, :, top : top + 8, left : left + 8])
        functional.cross_entropy(logits, labels[train]).backward()
        optimizer.step()
    with torch.no_grad():
        correct = network.eval()(images[300:]).argmax(1) == labels[300:]
    assert correct.float().mean() > 0.75
    assert parameter_count(network) < 100_000


def test_parameters_are_counted_once_and_buffers_not():
    network = build(ResNetConfig(width=2, blocks=(1,), pool=1), num_classes=3)
    stem, norms, convs, head = 18, 3 * 2 * 2, 2 * 36, 2 * 3 + 3
    assert parameter_count(network) == stem + norms + convs + head
    network.trunk.again = network.trunk.stem
    assert parameter_count(network) == stem + norms + convs + head


def test_images_are_resized_repeated_and_normalised_as_configured():
    normalise = Normalise(mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 2.0))
    config = InputConfig(resize=16, grey_to_rgb=True, normalise=normalise)
    assert config.adapted_shape(GREY) == (3, 16, 16)
    # A constant image stays constant under resizing: -1 is black (0), +1 is white (1).
    for value, expected in ((-1.0, (-1.0, -0.5, 0.0)), (1.0, (1.0, 1.5, 0.5))):
        adapted = InputAdapter(config)(torch.full((2, *GREY), value))
        wanted = torch.tensor(expected)[None, :, None, None].expand(2, 3, 16, 16)
        torch.testing.assert_close(adapted, wanted)


def test_without_options_images_are_not_changed():
    images = images_of()
    assert torch.equal(InputAdapter(InputConfig())(images), images)
    half = Normalise(mean=(0.5,), std=(0.5,))
    torch.testing.assert_close(InputAdapter(InputConfig(normalise=half))(images), images)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (ResNetConfig(), (1, 7, 8), "8x8 pixels or more, got 7x8"),
        (ResNetConfig(stem_stride=4, pool=1), (1, 15, 15), "16x16"),
        (ResNetConfig(grey_to_rgb=True), (3, 8, 8), "1 channel, got 3"),
        (ResNetConfig(normalise={"mean": [0.1, 0.2], "std": [1.0]}), GREY, "normalise.mean"),
        (ResNetConfig(), (8, 8), "image shape"),
    ],
)
def test_images_that_do_not_fit_are_rejected(config, shape, message):
    with pytest.raises(ConfigError, match=message):
        build(config, image_shape=shape)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_smallest_images_and_widths_work(norm):
    config = ResNetConfig(width=1, blocks=(1, 1), pool=1, norm=norm)
    network = build(config, image_shape=(2, 2, 3), num_classes=2)
    assert network(images_of((2, 2, 3))).shape == (6, 2)


def test_small_images_fit_after_resizing():
    assert build(ResNetConfig(resize=8), image_shape=(1, 3, 3)).eval()(
        images_of((1, 3, 3))
    ).shape == (6, 5)


def test_a_head_needs_two_classes():
    with pytest.raises(ConfigError, match="at least 2 classes, got 1"):
        build(num_classes=1)
    with pytest.raises(ConfigError, match="got 0"):
        replace_head(build(), 0, seeded())


def test_images_of_another_shape_are_rejected():
    with pytest.raises(ValueError, match=r"expected images \(N, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        build()(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"kind": "resnet", "width": 0}, "width"),
        ({"kind": "resnet", "blocks": []}, "blocks"),
        ({"kind": "resnet", "blocks": [1, 0]}, "blocks"),
        ({"kind": "resnet", "widht": 8}, "did you mean 'width'"),
        ({"kind": "resnet", "normalise": {"mean": [0.0], "std": [0.0]}}, "std must be > 0"),
        ({"kind": "resent"}, "resnet"),
        ({"kind": "transformers"}, "exactly one of architecture"),
        ({"kind": "transformers", "path": "a", "architecture": "vit"}, "exactly one of"),
        ({"kind": "transformers", "path": "a", "config": {"depths": [1]}}, "has its own config"),
        ({"kind": "timm", "name": "a", "config": {"checkpoint_path": "x"}}, "checkpoint_path"),
    ],
)
def test_an_invalid_configuration_has_a_clear_message(network, message):
    with pytest.raises(ConfigError, match=message):
        validate(Job, {"network": network}, source="job")


def test_the_kind_selects_the_configuration_class():
    job = validate(Job, {"network": {"kind": "resnet", "blocks": [1, 2]}}, source="job")
    assert job.network == ResNetConfig(blocks=(1, 2))
