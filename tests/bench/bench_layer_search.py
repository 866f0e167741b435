"""Layer search against scikit-learn: all single layers and the greedy search, over many episodes.

The baseline fits one LogisticRegression per episode and layer. Both use one thread and the same
features. Run by `launch/bench layer_search`.
"""

import time

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from dist_tl.datasets.digits import DigitsConfig
from dist_tl.datasets.spec import load_images
from dist_tl.methods.layer_search.episodes import EpisodesConfig, draw_episode
from dist_tl.methods.layer_search.evaluate import accuracies
from dist_tl.methods.layer_search.features import PoolingConfig, layer_vectors
from dist_tl.methods.layer_search.gram import layer_grams
from dist_tl.methods.layer_search.search import SearchConfig, select_layers
from dist_tl.models.networks import build_network
from dist_tl.models.resnet import ResNetConfig

EPISODES, SHOTS = 600, 5
PEER_EPISODES = 30  # the first of the same episodes; the time is extrapolated
CONFIG = EpisodesConfig(shots=(SHOTS,), count=EPISODES)


@torch.no_grad()
def features():
    """Returns five layers of an untrained network, and labels.

    Cost and ranking of the layers are similar to those of a trained network.
    """
    data = load_images(DigitsConfig())
    network = build_network(
        ResNetConfig(width=16, blocks=(1, 1, 1, 1), pool=1),
        num_classes=10,
        image_shape=data.image_shape,
        rng=torch.Generator().manual_seed(0),
    ).eval()
    phis = layer_vectors(network.blocks(data.tensor()), PoolingConfig())
    return [phi.double() for phi in phis], data.labels


def ours(phis, labels):
    """Returns seconds for all episodes, and the accuracy of every layer per episode."""
    search, table = SearchConfig(permutations=0), []
    began = time.perf_counter()
    for index in range(EPISODES):
        episode = draw_episode(labels, CONFIG, SHOTS, seed=0, index=index)
        items = torch.from_numpy(np.concatenate([episode.support_S, episode.query_Q]))
        support, size = torch.from_numpy(episode.support_labels_S), len(episode.support_S)
        grams = layer_grams(phis, items, size)
        chosen = select_layers(grams[:, :size], support, search, rng=np.random.default_rng(index))
        sets = [*((layer,) for layer in range(len(phis))), chosen.layers]
        queries = torch.from_numpy(episode.query_labels_Q)
        table.append(accuracies(grams, support, queries, sets, search.classifier).tolist())
    return time.perf_counter() - began, np.array(table)


def peer(phis, labels):
    """Returns extrapolated seconds for all episodes, and accuracies of the measured ones."""
    columns, table = [phi.numpy() for phi in phis], []
    began = time.perf_counter()
    for index in range(PEER_EPISODES):
        episode = draw_episode(labels, CONFIG, SHOTS, seed=0, index=index)
        row = []
        for phi in columns:
            model = LogisticRegression(C=100.0, max_iter=1000)  # as accurate as ours
            model.fit(phi[episode.support_S], episode.support_labels_S)
            row.append(model.score(phi[episode.query_Q], episode.query_labels_Q))
        table.append(row)
    return (time.perf_counter() - began) * EPISODES / PEER_EPISODES, np.array(table)


def main():
    torch.set_num_threads(1)
    phis, labels = features()
    our_seconds, our_table = ours(phis, labels)
    peer_seconds, peer_table = peer(phis, labels)
    layers = len(phis)
    gap = 100 * (our_table[:PEER_EPISODES, :layers].mean() - peer_table.mean())
    print(f"{EPISODES} episodes of 5 classes, {SHOTS} labels each, {layers} layers, one thread")
    print(f"ours, all single layers and greedy   {our_seconds:8.2f} s")
    print(f"LogisticRegression, single layers    {peer_seconds:8.2f} s (from {PEER_EPISODES})")
    print(
        f"ratio {peer_seconds / our_seconds:.1f}x; mean accuracy {gap:+.2f} points to the baseline"
    )


if __name__ == "__main__":
    main()
