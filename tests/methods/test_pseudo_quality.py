"""Quality measures: agreement, and closed forms of the Frechet distance."""

import math

import pytest
import torch

from dist_tl.methods.pseudo.quality import agreement, feature_moments, frechet_distance


def some_moments(seed, dim=5):
    rng = torch.Generator().manual_seed(seed)
    factor = torch.randn(dim, dim, generator=rng, dtype=torch.float64)
    return torch.randn(dim, generator=rng, dtype=torch.float64), factor @ factor.T


def some_rotation(dim=5):
    rng = torch.Generator().manual_seed(9)
    return torch.linalg.qr(torch.randn(dim, dim, generator=rng, dtype=torch.float64)).Q


def test_agreement_counts_samples_of_their_requested_class():
    logits = torch.tensor([[3.0, 1.0], [0.0, 1.0], [2.0, 5.0], [9.0, 1.0]])
    assert agreement(logits, torch.tensor([0, 1, 0, 0])) == 0.75
    assert agreement(logits, logits.argmax(dim=1)) == 1.0


def test_agreement_without_samples_is_rejected():
    with pytest.raises(ValueError, match="S >= 1"):
        agreement(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))


def test_the_distance_of_a_gaussian_to_itself_is_zero():
    mean, cov = some_moments(0)
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0.0, abs=1e-10)


def test_diagonal_gaussians_have_the_closed_form():
    m1, m2 = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 2.0, -2.0])
    v1, v2 = torch.tensor([4.0, 9.0, 0.0]), torch.tensor([1.0, 16.0, 0.25])
    expected = 5.0 + (2 - 1) ** 2 + (3 - 4) ** 2 + 0.5**2
    distance = frechet_distance(m1, v1.diag(), m2, v2.diag())
    assert distance == pytest.approx(expected, rel=1e-12)


def test_scaled_covariances_have_the_closed_form():
    mean, cov = some_moments(0)
    expected = (3 - 1) ** 2 * cov.trace().item()
    assert frechet_distance(mean, cov, mean, 9 * cov) == pytest.approx(expected, rel=1e-9)


def test_the_distance_is_symmetric():
    left, right = some_moments(0), some_moments(1)
    assert frechet_distance(*left, *right) == pytest.approx(frechet_distance(*right, *left))


def test_the_distance_is_invariant_to_shift_and_rotation_and_scales_quadratically():
    (m1, c1), (m2, c2), q = some_moments(0), some_moments(1), some_rotation()
    plain = frechet_distance(m1, c1, m2, c2)
    assert frechet_distance(m1 + 7, c1, m2 + 7, c2) == pytest.approx(plain)
    rotated = frechet_distance(q @ m1, q @ c1 @ q.T, q @ m2, q @ c2 @ q.T)
    assert rotated == pytest.approx(plain)
    assert frechet_distance(3 * m1, 9 * c1, 3 * m2, 9 * c2) == pytest.approx(9 * plain)


def test_the_distance_of_a_mean_shift_is_its_square():
    mean, cov = some_moments(0)
    shift = torch.arange(5.0, dtype=torch.float64)
    assert frechet_distance(mean, cov, mean + shift, cov) == pytest.approx(30.0)


def test_singular_covariances_have_a_distance():
    mean, singular = torch.zeros(2), torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    assert frechet_distance(mean, singular, mean, torch.zeros(2, 2)) == pytest.approx(2.0)


def test_moments_are_those_of_numpy_in_float64():
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    mean, cov = feature_moments(features)
    assert mean.dtype == cov.dtype == torch.float64
    torch.testing.assert_close(mean, features.double().mean(dim=0))
    torch.testing.assert_close(cov, torch.cov(features.double().T))


def test_moments_of_two_points_have_the_closed_form():
    mean, cov = feature_moments(torch.tensor([[0.0, 2.0], [2.0, 0.0]]))
    assert mean.tolist() == [1.0, 1.0]
    assert cov.tolist() == [[2.0, -2.0], [-2.0, 2.0]]


def test_fewer_samples_than_features_still_give_a_distance():
    few = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(*feature_moments(few), *feature_moments(few)) == pytest.approx(
        0.0, abs=1e-9
    )


def test_moments_that_do_not_fit_are_rejected():
    mean, cov = some_moments(0)
    with pytest.raises(ValueError, match="covariances"):
        frechet_distance(mean[:3], cov, mean, cov)
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(mean, cov, mean, cov * math.nan)
    with pytest.raises(ValueError, match="S >= 2"):
        feature_moments(torch.zeros(1, 3))
