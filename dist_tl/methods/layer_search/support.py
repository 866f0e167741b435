"""Tensors of one episode, its selection, and networks for its support.

Shape suffixes: N = items of the data set, E = items of an episode (support first), S = support,
Q = queries, V = views of support items, view after view, L = layers, D = feature width,
C = classes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_tl.methods.layer_search.classifiers import ridge_head
from dist_tl.methods.layer_search.episodes import Episode
from dist_tl.methods.layer_search.evaluate import select_by_views
from dist_tl.methods.layer_search.gram import LayerSet, layer_grams
from dist_tl.methods.layer_search.search import SearchConfig, Selection, select_layers


def episode_tensors(phis: Sequence[Tensor], episode: Episode) -> tuple[Tensor, Tensor, Tensor]:
    """Returns Gram matrices (L, E, S), support labels (S,) and query labels (Q,).

    Args:
        phis: the (N, D) tensors of every layer.
    """
    items_E = torch.from_numpy(np.concatenate([episode.support_S, episode.query_Q]))
    support_labels_S = torch.from_numpy(episode.support_labels_S)
    query_labels_Q = torch.from_numpy(episode.query_labels_Q)
    return layer_grams(phis, items_E, len(support_labels_S)), support_labels_S, query_labels_Q


def select_for_episode(
    gram_LES: Tensor,
    episode: Episode,
    views: Sequence[Sequence[Tensor]],
    config: SearchConfig,
    *,
    rng: np.random.Generator,
    fixed: LayerSet | None,
) -> Selection:
    """Selects layers from the support alone: by augmented views if there are any.

    Args:
        views: the (N, D) tensors of every layer, for each view.
        rng: shuffles labels for the calibration.
        fixed: the layers found on held-out classes, for one label per class.
    """
    labels_S = torch.from_numpy(episode.support_labels_S)
    if not views:
        gram_LSS = gram_LES[:, : len(labels_S)]
        return select_layers(gram_LSS, labels_S, config, rng=rng, fixed=fixed)
    support_S = torch.from_numpy(episode.support_S)
    layers = [
        torch.cat([phi_ND[support_S] for phi_ND in layer]) for layer in zip(*views, strict=True)
    ]
    gram_LVV = layer_grams(layers, torch.arange(len(layers[0])))
    return select_by_views(gram_LVV, labels_S, len(views), config)


def layers_head(vectors: Sequence[Tensor], y_SC: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Returns weight (C, D) and bias (C,) of a ridge head on concatenated layers.

    Args:
        vectors: the support's (S, d) unit vectors of each layer.
        y_SC: one-hot labels, float64.
    """
    joined_SD = torch.cat(list(vectors), dim=1) / len(vectors) ** 0.5
    return ridge_head(joined_SD.double(), y_SC, penalty)


def train_on_support(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels_S: Tensor,
    rng: torch.Generator,
    *,
    steps: int,
    batch_size: int,
) -> None:
    """Trains `network` in place by cross-entropy on random batches of the support."""
    network.train()
    size = min(batch_size, len(images))
    for _ in range(steps):
        rows = torch.randperm(len(images), generator=rng)[:size]
        optimizer.zero_grad()
        functional.cross_entropy(network(images[rows]), labels_S[rows]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Returns the share of images classified correctly; leaves `network` in eval mode."""
    return float((network.eval()(images).argmax(dim=1) == labels).double().mean())
