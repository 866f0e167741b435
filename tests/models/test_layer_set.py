"""A head on some blocks of a network: the result of a search, saved and loaded like any model."""

import pytest
import torch

from dist_tl.errors import ConfigError
from dist_tl.methods.layer_search.classifiers import ClassifierConfig, query_scores, ridge_head
from dist_tl.methods.layer_search.features import PoolingConfig, layer_vectors
from dist_tl.methods.layer_search.gram import layer_grams, one_hot, set_grams
from dist_tl.models.files import load_network, save_network
from dist_tl.models.networks import build_network, with_layers
from dist_tl.models.resnet import ResNetConfig

SHAPE = (1, 8, 8)
LABELS = torch.arange(12) % 3


def teacher():
    network = build_network(
        ResNetConfig(width=4, blocks=(1, 1)),
        num_classes=3,
        image_shape=SHAPE,
        rng=torch.Generator().manual_seed(0),
    )
    return network.eval()


def images(count, seed=0):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def headed(layers=(0, 2)):
    network, support = teacher(), images(12)
    phis = layer_vectors(network.blocks(support), PoolingConfig())
    joined = torch.cat([phis[layer] for layer in layers], dim=1).double() / len(layers) ** 0.5
    weight, bias = ridge_head(joined, one_hot(LABELS, 3), 0.1)
    return with_layers(network, layers, cells=4, weight_CD=weight, bias_C=bias).eval()


@pytest.mark.parametrize("layers", [(0,), (0, 2), (0, 1, 2)])
@torch.no_grad()
def test_logits_equal_the_scores_of_the_search(layers):
    network, queries = headed(layers), images(7, seed=1)
    phis = layer_vectors(teacher().blocks(torch.cat([images(12), queries])), PoolingConfig())
    grams = set_grams(layer_grams(phis, torch.arange(19), 12), [layers])
    expected = query_scores(
        grams[:, :12], grams[:, 12:], one_hot(LABELS, 3), ClassifierConfig(penalty=0.1)
    )
    torch.testing.assert_close(network(queries).double(), expected[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_saving_and_loading_is_bit_exact():
    network, queries = headed(), images(4, seed=2)
    again = load_network(save_network(network)).eval()
    assert torch.equal(again(queries), network(queries))


def test_all_parameters_can_be_fine_tuned():
    network = headed().train()
    before = network.trunk.base.stem.weight.clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(network(images(12)), LABELS).backward()
    optimizer.step()
    assert not torch.equal(network.trunk.base.stem.weight, before)


def test_unknown_blocks_and_heads_that_do_not_fit_are_rejected():
    with pytest.raises(ConfigError, match="expected blocks 0 to 2"):
        with_layers(teacher(), (3,), cells=4, weight_CD=torch.zeros(3, 4), bias_C=torch.zeros(3))
    with pytest.raises(ValueError, match="expected a head"):
        with_layers(teacher(), (0,), cells=4, weight_CD=torch.zeros(3, 4), bias_C=torch.zeros(3))
