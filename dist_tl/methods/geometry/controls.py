"""Control labels for G2L: nearest anchors, clusters, and shuffled labels.

The notes on Kender et al., arXiv:2207.03554, section "Controls". nearest-m is the decisive control:
only this comparison shows whether the content of simplices matters.

Shape suffixes: N = items, M = anchors, D = feature width, m = length of a label.
"""

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from dist_tl.errors import ConfigError
from dist_tl.methods.geometry.item_labels import Anchors


def nearest_anchors(features_ND: Tensor, anchors: Anchors, m: int) -> Tensor:
    """Returns the m nearest anchors of each item by distance, int64 (N, m); ties to the lowest.

    Raises:
        ConfigError: m exceeds the number of anchors.
    """
    if m > len(anchors.points_MD):
        raise ConfigError(
            f"labels: m = {m} exceeds the number of anchors, {len(anchors.points_MD)}"
        )
    x_ND = features_ND.double() - anchors.origin_D
    distance_NM = (
        x_ND.square().sum(dim=1, keepdim=True)
        + anchors.points_MD.square().sum(dim=1)
        - 2 * x_ND @ anchors.points_MD.T
    )
    return distance_NM.argsort(dim=1, stable=True)[:, :m]


def shuffled_labels(classes_N: Tensor, rng: np.random.Generator) -> Tensor:
    """Shuffles the labels over the items: the same histogram without information."""
    return classes_N[torch.from_numpy(rng.permutation(len(classes_N)))]


def kmeans_labels(features_ND: Tensor, num_classes: int, *, seed: int) -> Tensor:
    """Returns k-means clusters of the features, int64 (N,).

    Raises:
        ConfigError: more clusters than items.
    """
    if not 1 <= num_classes <= len(features_ND):
        raise ConfigError(f"k-means: expected 1 to {len(features_ND)} clusters, got {num_classes}")
    # scikit-learn has no annotations; pyright infers str from the default n_init="auto".
    model = KMeans(num_classes, n_init=4, random_state=seed % 2**32)  # pyright: ignore[reportArgumentType]
    return torch.from_numpy(model.fit_predict(features_ND.double().numpy())).long()
