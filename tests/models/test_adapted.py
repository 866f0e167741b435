"""A network with its own preprocessing equals the base network on preprocessed images."""

import pytest
import torch

from dist_tl.errors import ConfigError
from dist_tl.models.adapted import AdaptedConfig
from dist_tl.models.files import load_network, save_network
from dist_tl.models.inputs import InputAdapter, InputConfig, Normalise
from dist_tl.models.networks import (
    behind_inputs,
    build_network,
    on_one_block,
    parameter_count,
    replace_head,
)
from dist_tl.models.perceptron import PerceptronConfig
from dist_tl.models.resnet import ResNetConfig

GREY, COLOURED = (1, 8, 8), (3, 12, 12)
INPUTS = InputConfig(
    resize=12, grey_to_rgb=True, normalise=Normalise(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def network(config=None, shape=COLOURED):
    config = config or ResNetConfig(width=4, blocks=(1, 1))
    made = build_network(config, num_classes=3, image_shape=shape, rng=rng())
    made(torch.randn(8, *shape, generator=rng()))  # moves statistics
    return made.eval()


def grey(rows=5):
    return torch.rand(rows, *GREY, generator=rng(1)) * 2 - 1


def test_output_equals_the_base_network_on_preprocessed_images():
    base = network()
    prepared = InputAdapter(INPUTS)(grey())
    assert prepared.shape == (5, *COLOURED)
    expected = base(prepared)
    assert torch.equal(behind_inputs(base, INPUTS, GREY)(grey()), expected)


def test_only_images_of_its_own_shape_are_accepted():
    adapted = behind_inputs(network(), INPUTS, GREY)
    assert adapted.image_shape == GREY
    with pytest.raises(ValueError, match=r"expected images \(N, 1, 8, 8\), got \(5, 3, 12, 12\)"):
        adapted(InputAdapter(INPUTS)(grey()))


def test_it_shares_the_weights_and_adds_none():
    base = network()
    adapted = behind_inputs(base, INPUTS, GREY)
    assert {id(p) for p in adapted.parameters()} == {id(p) for p in base.parameters()}
    assert parameter_count(adapted) == parameter_count(base)


def test_default_inputs_return_the_network_itself():
    base = network(shape=GREY)
    assert behind_inputs(base, InputConfig(), GREY) is base


@pytest.mark.parametrize("tap", [None, 0, 1])
def test_saving_and_loading_is_bit_exact(tap):
    base = network()
    base = base if tap is None else on_one_block(base, tap, 3, rng()).eval()
    adapted = behind_inputs(base, INPUTS, GREY)
    files = save_network(adapted)
    again = load_network(files).eval()
    assert again.config.kind == "adapted"
    assert torch.equal(again(grey()), adapted(grey()))
    assert save_network(again) == files


def test_it_can_be_built_from_its_configuration_and_its_head_replaced():
    config = AdaptedConfig(base=PerceptronConfig(), inputs=InputConfig(resize=4))
    built = build_network(config, num_classes=3, image_shape=GREY, rng=rng())
    assert built(grey()).shape == (5, 3)
    wide = replace_head(built, 7, rng())
    assert wide(grey()).shape == (5, 7)
    assert torch.equal(wide.features(grey()), built.features(grey()))
    assert wide.config == config


def test_its_blocks_are_those_of_the_base():
    base = network()
    adapted = behind_inputs(base, INPUTS, GREY)
    expected = base.blocks(InputAdapter(INPUTS)(grey()))
    found = adapted.blocks(grey())
    assert len(found) == len(expected)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("inputs", "shape", "message"),
    [
        (InputConfig(), GREY, r"expected images .*\(3, 12, 12\), got \(1, 8, 8\)"),
        (InputConfig(resize=12), GREY, r"got \(1, 12, 12\); set its inputs"),
        (INPUTS, (3, 8, 8), "grey_to_rgb: expected images of 1 channel, got 3"),
    ],
)
def test_inputs_that_do_not_fit_the_network_are_rejected(inputs, shape, message):
    with pytest.raises(ConfigError, match=message):
        behind_inputs(network(), inputs, shape)


def test_an_adapted_network_takes_no_further_inputs_and_no_head_on_a_block():
    adapted = behind_inputs(network(), INPUTS, GREY)
    with pytest.raises(ConfigError, match="already has inputs"):
        behind_inputs(adapted, InputConfig(resize=8), (1, 16, 16))
    with pytest.raises(ConfigError, match="kind adapted cannot take a head on its blocks"):
        on_one_block(adapted, 0, 3, rng())
    assert behind_inputs(adapted, InputConfig(), GREY) is adapted


def test_a_head_on_one_block_has_its_own_copy_of_the_trunk():
    base = network()
    cut = on_one_block(base, 0, 3, rng())
    with torch.no_grad():
        next(cut.trunk.parameters()).add_(1.0)
    assert not torch.equal(next(cut.trunk.parameters()), next(base.trunk.parameters()))
    with pytest.raises(ConfigError, match=r"blocks \[9\]: expected blocks 0 to"):
        on_one_block(base, 9, 3, rng())
