"""The mixture theory compared with Gaussian theory, closed forms and fits of samples."""

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr, ndtri

from dist_tl.errors import NotConvergedError
from dist_tl.methods.hidden_manifold.mixture import solve_mixture
from dist_tl.methods.hidden_manifold.readout import fit_path
from dist_tl.methods.hidden_manifold.saddle_point import solve, spectrum
from dist_tl.seeds import torch_rng

LOSSES = ["ridge", "logistic"]


def gaussian_model(latent, features):
    rng = torch_rng(1, "mixture model")
    a = torch.randn(latent, features, generator=rng, dtype=torch.float64) / math.sqrt(latent)
    omega = a.T @ a + 0.3 * torch.eye(features, dtype=torch.float64)
    theta = torch.randn(latent, generator=rng, dtype=torch.float64)
    return torch.eye(latent, dtype=torch.float64), a, omega, theta


def in_bins(phi, omega, theta, num_bins):
    """Moments of y v in equally likely bins of |u|, u = theta . c / |theta|, in closed form.

    v = u a + rest, so y v = |u| a + y rest; |u| is half normal, cut at the edges of its bin.
    """
    a = phi.T @ theta / theta.norm()
    edges = np.append(ndtri(0.5 + 0.5 * np.arange(num_bins) / num_bins), 40.0)
    density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    mean = -2 * num_bins * np.diff(density)
    variance = 1 - 2 * num_bins * np.diff(edges * density) - mean**2
    shared = torch.outer(a, a)
    cov = torch.stack([omega - shared * (1 - s) for s in variance])
    mu = torch.stack([a * m for m in mean])
    return torch.full((num_bins,), 1 / num_bins, dtype=torch.float64), mu, cov


def some_mixture(features=40, num_bins=3):
    """Bins that differ in weight, mean (of a norm that K does not change) and covariance."""
    rng = torch_rng(2, "mixture")
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)[:num_bins]
    mu = torch.randn(num_bins, features, generator=rng, dtype=torch.float64) * 0.6
    mu = (mu + torch.linspace(0.2, 2.0, num_bins).double()[:, None]) / math.sqrt(features)
    roots = torch.randn(num_bins, features, features, generator=rng, dtype=torch.float64)
    cov = roots @ roots.mT / features + 0.2 * torch.eye(features, dtype=torch.float64)
    return p / p.sum(), mu, cov


# Limits


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("alpha", "lam"), [(0.5, 1e-2), (2.0, 1e-2), (2.0, 1.0)])
def test_bins_of_a_gaussian_model_reproduce_the_gaussian_theory(loss, alpha, lam):
    model = gaussian_model(100, 200)
    gaussian = solve(spectrum(*model), alpha=alpha, lam=lam, loss=loss)
    mixture = solve_mixture(*in_bins(*model[1:], 8), alpha=alpha, lam=lam, loss=loss)
    assert mixture.error == pytest.approx(gaussian.error, abs=1e-3)


def test_a_single_bin_ignores_non_gaussian_margins():
    model = gaussian_model(100, 200)
    gaussian = solve(spectrum(*model), alpha=2.0, lam=1e-2, loss="logistic")
    coarse = solve_mixture(*in_bins(*model[1:], 1), alpha=2.0, lam=1e-2, loss="logistic")
    assert abs(coarse.error - gaussian.error) > 5e-3


def test_many_samples_of_one_bin_reach_fishers_discriminant():
    p, mu, cov = some_mixture(num_bins=1)
    fisher = float(mu[0] @ torch.linalg.solve(cov[0], mu[0]))
    for loss in LOSSES:
        found = solve_mixture(p, mu, cov, alpha=1e5, lam=1e-2, loss=loss)
        assert found.error == pytest.approx(float(ndtr(-math.sqrt(fisher))), abs=1e-4)


def test_bins_without_a_mean_have_error_one_half():
    p, mu, cov = some_mixture()
    for loss in LOSSES:
        found = solve_mixture(p, 0 * mu, cov, alpha=2.0, lam=0.1, loss=loss)
        assert found.error == pytest.approx(0.5, abs=1e-5)


def test_one_feature_in_one_bin_solves_the_scalar_equations():
    one = torch.ones(1, dtype=torch.float64)
    mu, s, alpha, lam = 0.8, 0.5, 3.0, 0.2
    found = solve_mixture(
        one, mu * one[:, None], s * one[:, None, None], alpha=alpha, lam=lam, loss="ridge"
    )
    v, m, q = found.v_B[0], found.m_B[0], found.q_B[0]
    hat = alpha / (1 + v)
    assert v == pytest.approx(s / (lam + hat * s), rel=1e-5)
    assert m == pytest.approx(mu**2 * hat * (1 - m) / (lam + hat * s), rel=1e-5)
    spread = hat / (1 + v) * ((1 - m) ** 2 + q) * (s / (lam + hat * s)) ** 2
    assert q == pytest.approx(s * (m / mu) ** 2 + spread, rel=1e-5)


# Samples


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_fits_of_a_sampled_mixture_agree_within_three_standard_errors(loss, alpha):
    features, draws, lams = 100, 40, [1e-1, 1.0]
    p, mu, cov = some_mixture(features)
    roots = torch.linalg.cholesky(cov)
    errors = np.empty((draws, len(lams)))
    for draw in range(draws):
        rng = torch_rng(draw, "mixture data")
        label = torch.multinomial(p, int(alpha * features), replacement=True, generator=rng)
        noise = torch.randn(len(label), features, generator=rng, dtype=torch.float64)
        yv = mu[label]
        for b, root in enumerate(roots):
            yv[label == b] += noise[label == b] @ root.T
        for i, w in enumerate(fit_path(yv, torch.ones(len(yv), dtype=torch.float64), lams, loss)):
            margin = (mu @ w) / torch.einsum("k,bkl,l->b", w, cov, w).sqrt()
            errors[draw, i] = p.numpy() @ ndtr(-margin.numpy())
    theory = [solve_mixture(p, mu, cov, alpha=alpha, lam=lam, loss=loss).error for lam in lams]
    standard_error = errors.std(axis=0, ddof=1) / math.sqrt(draws)
    assert np.all(np.abs(errors.mean(axis=0) - theory) < 3 * standard_error + 0.2 / features)


# Invariances


@pytest.mark.parametrize("loss", LOSSES)
def test_a_bin_split_in_two_equal_ones_changes_nothing(loss):
    p, mu, cov = some_mixture()
    whole = solve_mixture(p, mu, cov, alpha=1.5, lam=0.1, loss=loss)
    parts = torch.tensor([0.2, 0.3, 0.3, 0.2], dtype=torch.float64)
    rows = [0, 0, 1, 2]
    split = solve_mixture(parts, mu[rows], cov[rows], alpha=1.5, lam=0.1, loss=loss)
    assert split.error == pytest.approx(whole.error, abs=1e-10)
    np.testing.assert_allclose(split.m_B, whole.m_B[rows], rtol=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
def test_order_rotation_and_scale_do_not_matter(loss):
    p, mu, cov = some_mixture()
    rng = torch_rng(0, "rotation")
    turn = torch.linalg.qr(torch.randn(40, 40, generator=rng, dtype=torch.float64)).Q
    one = solve_mixture(p, mu, cov, alpha=1.5, lam=0.1, loss=loss)
    order = [2, 0, 1]
    other = solve_mixture(
        p[order],
        3 * mu[order] @ turn,
        9 * turn.T @ cov[order] @ turn,
        alpha=1.5,
        lam=0.9,
        loss=loss,
    )
    assert other.error == pytest.approx(one.error, abs=1e-8)
    np.testing.assert_allclose(other.q_B, one.q_B[order], rtol=1e-6)


# Iteration and rejected input


@pytest.mark.parametrize("loss", LOSSES)
def test_a_warm_start_saves_steps_and_changes_nothing_else(loss):
    problem = some_mixture()
    cold = solve_mixture(*problem, alpha=2.0, lam=0.1, loss=loss)
    warm = solve_mixture(*problem, alpha=2.0, lam=0.1, loss=loss, start=cold)
    assert warm.iterations < cold.iterations
    assert warm.error == pytest.approx(cold.error, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_iteration_without_convergence_is_an_error_that_names_the_problem(loss):
    with pytest.raises(NotConvergedError, match=r"alpha = 2, lam = 0\.1 .* 1 iterations"):
        solve_mixture(*some_mixture(), alpha=2.0, lam=0.1, loss=loss, max_iterations=1)


def test_ridge_converges_for_equal_samples_and_features():
    found = solve_mixture(*some_mixture(), alpha=1.0, lam=1e-3, loss="ridge")
    assert 0 < found.error < 0.5


def test_problems_outside_the_theory_are_rejected():
    p, mu, cov = some_mixture()
    with pytest.raises(ValueError, match="alpha"):
        solve_mixture(p, mu, cov, alpha=0.0, lam=0.1, loss="ridge")
    with pytest.raises(ValueError, match="separable"):
        solve_mixture(p, mu, cov, alpha=1.0, lam=0.0, loss="ridge")
    with pytest.raises(ValueError, match="got 'hinge'"):
        solve_mixture(p, mu, cov, alpha=1.0, lam=0.1, loss="hinge")
    with pytest.raises(ValueError, match="cov"):
        solve_mixture(p[:2], mu, cov, alpha=1.0, lam=0.1, loss="ridge")
    with pytest.raises(ValueError, match="cov"):
        solve_mixture(p, mu, cov[:, :-1], alpha=1.0, lam=0.1, loss="ridge")
