"""Labels that G2L must be compared with: without geometry, by clustering, by chance.

The notes on Kender et al., arXiv:2207.03554, section "Controls". nearest-m is the decisive one:
without it nothing shows that the content of simplices matters.

Shape suffixes: N = items, M = anchors, D = feature width, m = length of a label.
"""

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from dist_tl.errors import ConfigError
from dist_tl.methods.geometry.item_labels import Anchors


def nearest_anchors(features_ND: Tensor, anchors: Anchors, m: int) -> Tensor:
    """The m nearest anchors of each item in order of distance, int64 (N, m); ties to the lowest.

    Raises:
        ConfigError: m larger than the number of anchors.
    """
    if m > len(anchors.points_MD):
        raise ConfigError(
            f"labels: m = {m} anchors a label, and there are {len(anchors.points_MD)}"
        )
    x_ND = features_ND.double() - anchors.origin_D
    distance_NM = (
        x_ND.square().sum(dim=1, keepdim=True)
        + anchors.points_MD.square().sum(dim=1)
        - 2 * x_ND @ anchors.points_MD.T
    )
    return distance_NM.argsort(dim=1, stable=True)[:, :m]


def shuffled_labels(classes_N: Tensor, rng: np.random.Generator) -> Tensor:
    """The same labels given to items at random: an equal histogram and no information."""
    return classes_N[torch.from_numpy(rng.permutation(len(classes_N)))]


def kmeans_labels(features_ND: Tensor, num_classes: int, *, seed: int) -> Tensor:
    """Clusters of the features, int64 (N,).

    Raises:
        ConfigError: more clusters than items.
    """
    if not 1 <= num_classes <= len(features_ND):
        raise ConfigError(f"k-means: expected 1 to {len(features_ND)} clusters, got {num_classes}")
    model = KMeans(num_classes, n_init=4, random_state=seed % 2**32)
    return torch.from_numpy(model.fit_predict(features_ND.double().numpy())).long()
