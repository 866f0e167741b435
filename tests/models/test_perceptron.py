"""The one-layer student: its formula, its scale, saving and loading."""

import math

import pytest
import torch

from dist_tl.models.files import load_network, save_network
from dist_tl.models.networks import build_network
from dist_tl.models.perceptron import PerceptronConfig

SHAPE = (1, 2, 12)


def network(seed=0, **config):
    return build_network(
        PerceptronConfig(hidden=6, **config),
        num_classes=2,
        image_shape=SHAPE,
        rng=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("name", ["tanh", "relu", "erf"])
def test_features_follow_the_formula(name):
    student, images = network(activation=name), torch.randn(5, *SHAPE)
    expected = getattr(torch, name)(images.flatten(1) @ student.trunk.weight.T / math.sqrt(24))
    torch.testing.assert_close(student.features(images), expected)


def test_weights_are_standard_normal_and_depend_on_the_seed_only():
    config = PerceptronConfig(hidden=200)
    make = [
        build_network(
            config, num_classes=2, image_shape=(1, 1, 500), rng=torch.Generator().manual_seed(seed)
        ).trunk.weight.detach()
        for seed in (1, 1, 2)
    ]
    assert torch.equal(make[0], make[1])
    assert not torch.equal(make[0], make[2])
    assert abs(make[0].mean()) < 5 / math.sqrt(make[0].numel())
    assert abs(make[0].std() - 1) < 0.02


def test_saving_and_loading_is_bit_exact():
    student, images = network(), torch.randn(3, *SHAPE)
    again = load_network(save_network(student))
    assert torch.equal(again(images), student(images))


def test_the_only_block_is_the_heads_input():
    student, images = network(), torch.randn(3, *SHAPE)
    assert torch.equal(student.blocks(images)[-1], student.features(images))
