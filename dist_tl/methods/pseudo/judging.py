"""Judges pseudo samples in the feature space of the source classifier.

A job keeps the moments of the real training features, so that the generator can be judged after
the source data is gone.

Shape suffixes: S = samples, D = features.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dist_tl.methods.pseudo.quality import agreement, feature_moments, frechet_distance

FEATURE_BATCH = 512


class Classifier(Protocol):
    """A linear head on the features of a trunk."""

    head: nn.Linear

    def features(self, images: Tensor, /) -> Tensor:
        """Features (S, D) of images (S, channels, height, width)."""
        ...


class Moments(NamedTuple):
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: Tensor
    covariance: Tensor


def real_moments(
    classifier: Classifier, training: Tensor, held_out: Tensor
) -> tuple[Moments, float]:
    """Moments of the training images, and the Frechet distance of the held-out images to them.

    Args:
        training, held_out: (S >= 2, channels, height, width) float32 in [-1, 1].
    """
    moments = Moments(*feature_moments(_features(classifier, training)))
    others = feature_moments(_features(classifier, held_out))
    return moments, frechet_distance(*moments, *others)


def judge_samples(
    classifier: Classifier,
    images: Tensor,
    labels_S: Tensor,
    *,
    real: Moments | None,
    num_held_out: int,
) -> tuple[float, float | None]:
    """Agreement of pseudo samples with their labels, and their Frechet distance to real images.

    The distance uses as many samples as real images were held out: over few samples it is biased
    upwards, and only equal numbers of samples compare.

    Args:
        images: (S, channels, height, width) float32 in [-1, 1].
        labels_S: int64, the class each sample was generated for.
        real: moments of real images; None: no distance.
    """
    features_SD = _features(classifier, images)
    with torch.no_grad():
        share = agreement(classifier.head(features_SD.float()), labels_S)
    if real is None or not num_held_out:
        return share, None
    return share, frechet_distance(*real, *feature_moments(features_SD[:num_held_out]))


@torch.no_grad()
def _features(classifier: Classifier, images: Tensor) -> Tensor:
    return torch.cat([classifier.features(batch) for batch in images.split(FEATURE_BATCH)])
