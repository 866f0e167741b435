"""Unit vectors of block outputs, and few-shot episodes."""

import numpy as np
import pytest
import torch

from dist_tl.errors import ConfigError, NumericsError
from dist_tl.methods.layer_search.episodes import EpisodesConfig, check_classes, draw_episode
from dist_tl.methods.layer_search.features import PoolingConfig, layer_vectors, num_zero_vectors
from dist_tl.models.networks import build_network
from dist_tl.models.resnet import ResNetConfig

LABELS = np.repeat(np.arange(6), 30)
EPISODES = EpisodesConfig(ways=4, shots=(1, 3), queries=5, count=10)


def outputs(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randn(3, 2, 8, 8, generator=rng),
        torch.randn(3, 5, 7, generator=rng),  # tokens
        torch.randn(3, 4, 2, 2, generator=rng),
        torch.randn(3, 6, generator=rng),
    ]


def test_maps_are_pooled_tokens_averaged_and_the_last_output_is_unchanged():
    found = layer_vectors(outputs(), PoolingConfig(grid=4))
    assert [v.shape for v in found] == [(3, 32), (3, 7), (3, 16), (3, 6)]
    torch.testing.assert_close(found[3], torch.nn.functional.normalize(outputs()[3]))
    gap = layer_vectors(outputs(), PoolingConfig(kind="gap"))
    assert [v.shape[1] for v in gap] == [2, 7, 4, 6]


def test_all_vectors_are_of_length_one_and_scale_does_not_matter():
    found = layer_vectors(outputs(), PoolingConfig())
    for v in found:
        torch.testing.assert_close(v.norm(dim=1), torch.ones(3))
    scaled = layer_vectors([3.7 * o for o in outputs()], PoolingConfig())
    for one, other in zip(found, scaled, strict=True):
        torch.testing.assert_close(one, other)


def test_a_block_equal_to_the_heads_input_is_included_once():
    blocks = outputs()[:1]
    last = blocks[0].mean(dim=(2, 3))
    assert len(layer_vectors([*blocks, last], PoolingConfig(kind="gap"))) == 1
    assert len(layer_vectors([*blocks, last], PoolingConfig(grid=4))) == 2


def test_zero_vectors_stay_zero_and_are_counted():
    blocks = outputs()
    blocks[0][1] = 0
    found = layer_vectors(blocks, PoolingConfig())
    assert [num_zero_vectors(v) for v in found] == [1, 0, 0, 0]


def test_a_feature_that_is_not_finite_is_named():
    blocks = outputs()
    blocks[2][1, 0, 0, 0] = float("inf")
    with pytest.raises(NumericsError, match="layer 2: the feature of item 1"):
        layer_vectors(blocks, PoolingConfig())


def test_outputs_must_end_in_the_heads_input():
    with pytest.raises(ValueError, match="head's input"):
        layer_vectors(outputs()[:1], PoolingConfig())


def test_extracting_features_does_not_change_the_teacher():
    network = build_network(
        ResNetConfig(width=4, blocks=(1, 1)),
        num_classes=3,
        image_shape=(1, 8, 8),
        rng=torch.Generator().manual_seed(0),
    ).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        layer_vectors(network.blocks(torch.randn(5, 1, 8, 8)), PoolingConfig())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_support_and_queries_are_disjoint_and_balanced():
    for index in range(20):
        episode = draw_episode(LABELS, EPISODES, 3, seed=0, index=index)
        assert not set(episode.support_S) & set(episode.query_Q)
        assert len(set(episode.support_S)) == 12
        assert np.bincount(episode.support_labels_S).tolist() == [3] * 4
        assert np.bincount(episode.query_labels_Q).tolist() == [5] * 4
        for rows, own in (
            (episode.support_S, episode.support_labels_S),
            (episode.query_Q, episode.query_labels_Q),
        ):
            classes = {label: set(LABELS[rows[own == label]]) for label in range(4)}
            assert all(len(found) == 1 for found in classes.values())


def test_more_shots_extend_the_same_episode():
    one = draw_episode(LABELS, EPISODES, 1, seed=0, index=4)
    three = draw_episode(LABELS, EPISODES, 3, seed=0, index=4)
    np.testing.assert_array_equal(one.query_Q, three.query_Q)
    assert set(one.support_S) <= set(three.support_S)


def test_episodes_depend_on_seed_and_index_only():
    draws = [
        draw_episode(LABELS, EPISODES, 3, seed=seed, index=index).support_S.tolist()
        for seed, index in ((0, 1), (0, 1), (0, 2), (1, 1))
    ]
    assert draws[0] == draws[1]
    assert len({str(draw) for draw in draws}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": 7}, "at least 7 classes for 7 ways"),
        ({"shots": (26,)}, "need 31 items"),
        ({"shots": (0, 1)}, "at least 1 shot"),
    ],
)
def test_episodes_that_the_data_cannot_provide_are_rejected(changes, message):
    config = EPISODES.model_copy(update=changes)
    with pytest.raises(ConfigError, match=message):
        check_classes(LABELS, config)
