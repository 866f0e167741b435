"""Heads on chosen layers, selection by views, training on a support set."""

import numpy as np
import torch

from dist_tl.methods.layer_search.classifiers import ridge_head
from dist_tl.methods.layer_search.episodes import EpisodesConfig, draw_episode
from dist_tl.methods.layer_search.gram import layer_grams, one_hot
from dist_tl.methods.layer_search.search import SearchConfig
from dist_tl.methods.layer_search.support import (
    accuracy,
    episode_tensors,
    layers_head,
    select_for_episode,
    train_on_support,
)

LABELS_N = np.repeat(np.arange(3), 8)


def vectors(seed, width=6):
    rng = torch.Generator().manual_seed(seed)
    v_ND = torch.randn(len(LABELS_N), width, generator=rng, dtype=torch.float64)
    return v_ND / v_ND.norm(dim=1, keepdim=True)


def episode(shots):
    config = EpisodesConfig(ways=3, shots=(shots,), queries=2)
    return draw_episode(LABELS_N, config, shots, seed=0, index=0)


def test_tensors_of_an_episode_have_the_support_first():
    phis, drawn = [vectors(0), vectors(1)], episode(2)
    gram_LES, support_labels_S, query_labels_Q = episode_tensors(phis, drawn)
    assert gram_LES.shape == (2, 12, 6)
    assert torch.equal(gram_LES[:, :6], layer_grams(phis, torch.from_numpy(drawn.support_S)))
    assert support_labels_S.tolist() == drawn.support_labels_S.tolist()
    assert query_labels_Q.tolist() == drawn.query_labels_Q.tolist()


def test_a_head_on_one_layer_is_that_layers_ridge_head():
    phi_ND, y_NC = vectors(0), one_hot(torch.from_numpy(LABELS_N), 3)
    weight_CD, bias_C = layers_head([phi_ND], y_NC, 0.1)
    expected_CD, expected_C = ridge_head(phi_ND, y_NC, 0.1)
    assert torch.equal(weight_CD, expected_CD)
    assert torch.equal(bias_C, expected_C)
    weight_CD, _ = layers_head([phi_ND, vectors(1, 4)], y_NC, 0.1)
    assert weight_CD.shape == (3, 10)


def test_views_decide_only_if_there_are_any():
    phis, drawn, config = [vectors(0), vectors(1)], episode(1), SearchConfig(permutations=0)
    gram_LES, _, _ = episode_tensors(phis, drawn)
    rng = np.random.default_rng(0)
    fixed = select_for_episode(gram_LES, drawn, [], config, rng=rng, fixed=(0,))
    assert (fixed.layers, fixed.branch) == ((0,), "held_out_classes")
    views = [phis, [vectors(2), vectors(3)]]
    selection = select_for_episode(gram_LES, drawn, views, config, rng=rng, fixed=None)
    assert selection.branch == "augmented_views"


def test_training_on_a_support_fits_it_and_is_reproducible():
    labels_S = torch.arange(12) % 3
    images = torch.nn.functional.one_hot(labels_S, 3).float()
    weights = []
    for _ in range(2):
        network = torch.nn.Linear(3, 3)
        torch.nn.init.zeros_(network.weight)
        torch.nn.init.zeros_(network.bias)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        rng = torch.Generator().manual_seed(0)
        train_on_support(network, optimizer, images, labels_S, rng, steps=20, batch_size=50)
        assert accuracy(network, images, labels_S) == 1
        assert not network.training
        weights.append(network.weight.detach())
    assert torch.equal(*weights)
