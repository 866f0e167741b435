"""Pseudo samples are judged in the features of a classifier, against moments of real images."""

import pytest
import torch
from torch import nn

from dist_tl.methods.pseudo import judging
from dist_tl.methods.pseudo.quality import feature_moments, frechet_distance


class TwoFeatures(nn.Module):
    """Features are the means of the two channels; the larger one is the class."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2, bias=False)
        self.head.weight.data = torch.eye(2)

    def features(self, images):
        return images.mean(dim=(2, 3))


def images(count, seed):
    return torch.randn(count, 2, 3, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", [7, 512])
def test_moments_and_floor_are_those_of_all_features_at_once(monkeypatch, batch):
    monkeypatch.setattr(judging, "FEATURE_BATCH", batch)
    training, held_out = images(40, 0), images(10, 1)
    moments, floor = judging.real_moments(TwoFeatures(), training, held_out)
    mean, covariance = feature_moments(training.mean(dim=(2, 3)))
    assert torch.equal(moments.mean, mean)
    assert torch.equal(moments.covariance, covariance)
    others = feature_moments(held_out.mean(dim=(2, 3)))
    assert floor == frechet_distance(mean, covariance, *others)


def test_the_distance_uses_as_many_samples_as_real_images_were_held_out():
    real, _ = judging.real_moments(TwoFeatures(), images(40, 0), images(10, 1))
    samples = images(30, 2)
    labels = samples.mean(dim=(2, 3)).argmax(dim=1)
    labels[:3] = 1 - labels[:3]
    share, distance = judging.judge_samples(
        TwoFeatures(), samples, labels, real=real, num_held_out=10
    )
    assert share == pytest.approx(27 / 30)
    assert distance == frechet_distance(*real, *feature_moments(samples[:10].mean(dim=(2, 3))))


def test_without_real_images_there_is_agreement_and_no_distance():
    samples = images(5, 0)
    labels = torch.zeros(5, dtype=torch.int64)
    real = judging.Moments(*feature_moments(samples.mean(dim=(2, 3))))
    for moments, count in ((None, 10), (real, 0)):
        _, distance = judging.judge_samples(
            TwoFeatures(), samples, labels, real=moments, num_held_out=count
        )
        assert distance is None
