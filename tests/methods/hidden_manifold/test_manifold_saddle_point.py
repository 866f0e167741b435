"""The saddle point compared with closed forms, direct integration and fits of Gaussian data."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import expit, logit, ndtr

from dist_tl.errors import NotConvergedError, NumericsError
from dist_tl.methods.hidden_manifold.proximal import gaussian_nodes, prox_slope
from dist_tl.methods.hidden_manifold.readout import fit_path
from dist_tl.methods.hidden_manifold.saddle_point import (
    Spectrum,
    solve,
    solve_path,
    solve_real_data,
    spectrum,
)
from dist_tl.seeds import numpy_rng, torch_rng

LOSSES = ["ridge", "logistic"]


def some_law(features=60, floor=0.9, seed=0):
    """Returns a broad spectrum whose teacher explains `floor` of its variance."""
    rng = numpy_rng(seed, "law")
    omega = np.sort(np.exp(rng.normal(0, 1.5, features)))
    t = omega * rng.random(features)
    return Spectrum(omega, t * floor / (t / omega).sum(), 1.0)


def isotropic(features=10):
    return Spectrum(np.ones(features), np.full(features, 1 / features), 1.0)


def gaussian_model(latent, features, seed=0):
    """v = A^T c + noise: covariances and a teacher."""
    rng = torch_rng(seed, "model")
    a = torch.randn(latent, features, generator=rng, dtype=torch.float64) / math.sqrt(latent)
    omega = a.T @ a + 0.3 * torch.eye(features, dtype=torch.float64)
    theta = torch.randn(latent, generator=rng, dtype=torch.float64)
    return torch.eye(latent, dtype=torch.float64), a, omega, theta


# Closed forms


@pytest.mark.parametrize("alpha", [1.5, 2.0, 4.0])
def test_isotropic_features_have_the_error_of_least_squares(alpha):
    m = math.sqrt(2 / math.pi)
    q = m**2 + (1 - m**2) / (alpha - 1)
    found = solve(isotropic(), alpha=alpha, lam=1e-6, loss="ridge")
    assert found.error == pytest.approx(math.acos(m / math.sqrt(q)) / math.pi, abs=1e-6)


@pytest.mark.parametrize(("alpha", "error"), [(1.5, 0.260530), (2.0, 0.205952), (4.0, 0.130925)])
def test_isotropic_features_meet_the_reference_values(alpha, error):
    found = solve(isotropic(), alpha=alpha, lam=1e-6, loss="ridge")
    assert found.error == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_large_penalty_leaves_the_direction_of_the_mean(loss):
    law, alpha = some_law(), 2.0
    # w is then parallel to sum y v for every loss.
    m = alpha * math.sqrt(2 / math.pi) * law.t_K.sum()
    q = m**2 * (law.omega_K * law.t_K).sum() / law.t_K.sum() ** 2
    q += alpha * np.mean(law.omega_K**2)
    found = solve(law, alpha=alpha, lam=1e7, loss=loss)
    assert found.error == pytest.approx(math.acos(m / math.sqrt(q)) / math.pi, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("lam", [1e-4, 1e-2, 1.0])
def test_ridge_solves_its_linear_equations(alpha, lam):
    law = some_law()
    found = solve(law, alpha=alpha, lam=lam, loss="ridge")
    b, omega = math.sqrt(2 / math.pi), law.omega_K

    def residual(log_v):
        return math.log(np.mean(omega / (lam + alpha * omega / (1 + math.exp(log_v))))) - log_v

    v = math.exp(brentq(residual, -30, 30, xtol=1e-14))
    hat = alpha / (1 + v)
    shrunk = 1 / (lam + hat * omega)
    m = hat * b * (law.t_K * shrunk).sum()
    noise = hat / (1 + v) * np.mean((omega * shrunk) ** 2)
    signal = (hat * b) ** 2 * (omega * law.t_K * shrunk**2).sum()
    q = (signal + noise * (1 - 2 * b * m)) / (1 - noise)
    assert (found.v, found.m, found.q) == pytest.approx((v, m, q), rel=1e-5)
    assert found.test_mse == pytest.approx(1 + q - 2 * b * m, rel=1e-5)


def test_the_smallest_penalty_converges_for_equal_samples_and_features():
    found = solve(isotropic(), alpha=1.0, lam=1e-6, loss="ridge")
    assert found.v == pytest.approx((math.sqrt(1 + 4e6) - 1) / 2, rel=1e-4)  # lam V (1 + V) = 1
    solve(some_law(200), alpha=1.0, lam=1e-6, loss="ridge")


# Logistic, against direct integration


def prox(w, v):
    return brentq(lambda z: z - w - v * expit(-z), w - 1e-9, w + v + 1e-9, xtol=1e-13)


def gaussian_mean(integrand, scale, v):
    marks = [0, *(s * 10.0**k / scale for k in range(6) for s in (-1, 1))]
    marks += [(a * v + b) / scale for a in (-1, 0) for b in (-8, 0, 8)]
    edges = [-9, *sorted({x for x in marks if abs(x) < 9}), 9]
    density = 1 / math.sqrt(2 * math.pi)

    def weighed(x):
        return integrand(x) * math.exp(-x * x / 2) * density

    pieces = pairwise(edges)
    return sum(quad(weighed, a, b, epsabs=1e-13, epsrel=1e-8, limit=100)[0] for a, b in pieces)


@pytest.mark.parametrize(("alpha", "lam"), [(1.0, 1e-2), (0.25, 1e-4), (4.0, 1e-4)])
def test_logistic_overlaps_solve_the_integral_equations(alpha, lam):
    law = some_law()
    found = solve(law, alpha=alpha, lam=lam, loss="logistic")
    v, deviation = found.v, math.sqrt(found.q)
    teacher = found.m / math.sqrt(found.q * (law.rho - found.m**2 / found.q))

    def slope(x, scale=deviation):
        return expit(-prox(scale * x, v))

    def curvature(x):
        h = slope(x) * (1 - slope(x))
        return 2 * ndtr(teacher * x) * h / (1 + v * h)

    v_hat = alpha * gaussian_mean(curvature, deviation, v)
    q_hat = alpha * gaussian_mean(lambda x: 2 * ndtr(teacher * x) * slope(x) ** 2, deviation, v)
    blind = math.sqrt(found.q - found.m**2 / law.rho)
    mean_f = gaussian_mean(lambda x: slope(x, blind), blind, v)
    m_hat = alpha * math.sqrt(2 / (math.pi * law.rho)) * mean_f
    assert (found.v_hat, found.q_hat, found.m_hat) == pytest.approx((v_hat, q_hat, m_hat), rel=1e-6)
    shrunk = 1 / (lam + v_hat * law.omega_K)
    assert v == pytest.approx(np.mean(law.omega_K * shrunk), rel=1e-6)
    assert found.m == pytest.approx(m_hat * (law.t_K * shrunk).sum(), rel=1e-6)
    variance = m_hat**2 * (law.omega_K * law.t_K * shrunk**2).sum()
    variance += q_hat * np.mean((law.omega_K * shrunk) ** 2)
    assert found.q == pytest.approx(variance, rel=1e-6)


@pytest.mark.parametrize("v", [1e-9, 1.0, 1e3, 1e7])
def test_the_prox_solves_its_equation_at_any_curvature(v):
    w = np.concatenate([np.linspace(-3, 3, 101) * scale for scale in (1.0, 30.0, v, 1e4)])
    f = prox_slope(w, v)
    assert ((f >= 0) & (f <= 1)).all()
    rows = (f > 1e-300) & (f < 1 - 1e-6)  # where f determines z
    z = -logit(f[rows])
    step = (z - w[rows] - v * f[rows]) / (
        1 + v * f[rows] * (1 - f[rows])
    )  # one further Newton step
    assert np.abs(step / (1 + np.abs(z))).max() < 1e-9
    assert (w[f >= 1 - 1e-6] + v < -13).all()
    assert (w[f <= 1e-300] > 600).all()


@pytest.mark.parametrize("cuts", [[], [-1e9, 0.3, math.inf, math.nan], [1e-12, 1e-11]])
def test_the_quadrature_integrates_moments_for_any_cuts(cuts):
    node, weight = gaussian_nodes([0.0, *cuts])
    for power, moment in [(0, 1), (1, 0), (2, 1), (4, 3)]:
        assert weight @ node**power == pytest.approx(moment, abs=1e-9)


# Exactly Gaussian data


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("alpha", [0.5, 1.5, 3.0])
def test_fits_of_gaussian_data_agree_within_three_standard_errors(loss, alpha):
    latent, features, draws, lams = 60, 100, 16, [1e-2, 1.0]
    psi, phi, omega, theta = gaussian_model(latent, features)
    law, direction = spectrum(psi, phi, omega, theta), theta / math.sqrt(latent)
    errors = np.empty((draws, len(lams)))
    for draw in range(draws):
        rng = torch_rng(draw, "gaussian data")
        c = torch.randn(int(alpha * features), latent, generator=rng, dtype=torch.float64)
        noise = torch.randn(len(c), features, generator=rng, dtype=torch.float64)
        v, y = c @ phi + math.sqrt(0.3) * noise, torch.sign(c @ direction)
        for i, w in enumerate(fit_path(v, y, lams, loss)):
            cosine = w @ (phi.T @ direction) / (law.rho * (w @ omega @ w)).sqrt()
            errors[draw, i] = math.acos(float(cosine)) / math.pi
    theory = [found.error for found in solve_path(law, alpha=alpha, lams=lams, loss=loss)]
    standard_error = errors.std(axis=0, ddof=1) / math.sqrt(draws)
    # Corrections to the limit are of order 1 / K.
    assert np.all(np.abs(errors.mean(axis=0) - theory) < 3 * standard_error + 0.1 / features)


# Invariances


@pytest.mark.parametrize("loss", LOSSES)
def test_the_teachers_scale_does_not_matter(loss):
    law = some_law()
    longer = Spectrum(law.omega_K, 9 * law.t_K, 9 * law.rho)
    one = solve(law, alpha=2.0, lam=0.1, loss=loss)
    other = solve(longer, alpha=2.0, lam=0.1, loss=loss)
    assert (other.error, other.train_loss) == pytest.approx((one.error, one.train_loss), rel=1e-6)
    assert other.m == pytest.approx(3 * one.m, rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_larger_features_are_equivalent_to_a_smaller_penalty(loss):
    law = some_law()
    larger = Spectrum(4 * law.omega_K, 4 * law.t_K, law.rho)
    one = solve(law, alpha=2.0, lam=0.1, loss=loss)
    other = solve(larger, alpha=2.0, lam=0.4, loss=loss)
    assert (other.error, other.q, other.m) == pytest.approx((one.error, one.q, one.m), rel=1e-6)


def test_the_spectrum_is_invariant_to_rotations_of_the_features():
    psi, phi, omega, theta = gaussian_model(12, 8)
    draws = torch.randn(8, 8, generator=torch_rng(0, "rotation"), dtype=torch.float64)
    rotation = torch.linalg.qr(draws).Q
    one = spectrum(psi, phi, omega, theta)
    other = spectrum(psi, phi @ rotation, rotation.T @ omega @ rotation, theta)
    np.testing.assert_allclose(other.omega_K, one.omega_K, rtol=1e-10)
    np.testing.assert_allclose(other.t_K, one.t_K, rtol=1e-7, atol=1e-12)
    assert other.rho == one.rho


def test_ridge_without_a_teacher_agrees_with_ridge_with_one():
    law, b = some_law(), math.sqrt(2 / math.pi)
    for alpha, lam in [(0.3, 1e-3), (1.0, 1e-2), (5.0, 1.0)]:
        taught = solve(law, alpha=alpha, lam=lam, loss="ridge")
        real = solve_real_data(law.omega_K, b**2 * law.t_K, 1.0, alpha=alpha, lam=lam)
        assert real.test_mse == pytest.approx(taught.test_mse, rel=1e-6)
        assert real.train_loss == pytest.approx(taught.train_loss, rel=1e-6)
        assert real.m == pytest.approx(b * taught.m, rel=1e-6)
        assert math.isnan(real.error)


def test_without_a_teacher_the_error_is_linear_in_overlaps_of_either_sign():
    omega, t = some_law().omega_K, np.linspace(-0.01, 0.02, 60)

    def mse(t, rho):
        return solve_real_data(omega, t, rho, alpha=0.7, lam=0.1).test_mse

    assert mse((t + 3 * t[::-1]) / 4, 0.7) == pytest.approx(
        (mse(t, 1.0) + 3 * mse(t[::-1], 0.6)) / 4, rel=1e-6
    )


# Limits


def test_unrelated_labels_have_error_one_half():
    law = Spectrum(np.array([0.5, 1.0, 2.0]), np.zeros(3), 1.0)
    for loss in LOSSES:
        assert solve(law, alpha=2.0, lam=0.1, loss=loss).error == pytest.approx(0.5, abs=1e-12)
    assert law.floor_error() == 0.5


@pytest.mark.parametrize("loss", LOSSES)
def test_one_feature_is_enough(loss):
    law = spectrum(*(torch.ones(1, 1).double() for _ in range(3)), torch.ones(1).double())
    assert solve(law, alpha=50.0, lam=0.1, loss=loss).error < 0.1
    assert law.floor_error() == 0.0


@pytest.mark.parametrize("loss", LOSSES)
def test_many_samples_reach_the_floor_from_above(loss):
    law = some_law()
    errors = [solve(law, alpha=a, lam=0.1, loss=loss).error for a in (1, 10, 100, 1000)]
    assert errors == sorted(errors, reverse=True)
    assert law.floor_error() < errors[-1] < law.floor_error() + 0.003


def test_the_floor_ignores_directions_without_variance():
    law = Spectrum(np.array([0.0, 1.0]), np.array([0.0, 0.5]), 1.0)
    assert law.floor_error() == pytest.approx(0.25)


# Double descent, training losses, best penalties


def test_ridge_error_peaks_for_equal_samples_and_features():
    law = some_law()
    alphas = [0.5, 0.8, 1.0, 1.25, 2.0]
    errors = [solve(law, alpha=a, lam=1e-5, loss="ridge").error for a in alphas]
    assert np.argmax(errors) == 2
    assert errors[2] > max(errors[0], errors[-1]) + 0.01
    tamed = [solve(law, alpha=a, lam=1.0, loss="ridge").error for a in alphas]
    assert tamed == sorted(tamed, reverse=True)


def test_ridge_interpolates_below_the_peak_only():
    law = some_law()
    below, above = (solve(law, alpha=a, lam=1e-6, loss="ridge").train_loss for a in (0.5, 2.0))
    assert below < 1e-6 < 0.05 < above


def test_logistic_train_loss_leaves_zero_only_when_samples_stop_being_separable():
    law = some_law()
    separable, not_any_more = (
        solve(law, alpha=a, lam=1e-4, loss="logistic").train_loss for a in (1.0, 16.0)
    )
    assert separable < 5e-3 < 0.1 < not_any_more


@pytest.mark.parametrize("loss", LOSSES)
def test_training_losses_grow_with_the_penalty(loss):
    path = solve_path(some_law(), alpha=2.0, lams=[1e-4, 1e-2, 1.0, 100.0], loss=loss)
    losses = [found.train_loss for found in path]
    assert losses == sorted(losses)
    assert losses[-1] < (0.5 if loss == "ridge" else math.log(2))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_best_penalty_never_gets_worse_with_more_samples(loss):
    lams = [1e-2, 0.1, 1.0, 10.0]
    best = [
        min(found.error for found in solve_path(some_law(), alpha=a, lams=lams, loss=loss))
        for a in (0.3, 1.0, 4.0)
    ]
    assert best == sorted(best, reverse=True)


# Iterations and paths


@pytest.mark.parametrize("loss", LOSSES)
def test_a_path_holds_the_single_solutions_in_the_given_order(loss):
    lams = [1e-2, 1.0, 0.1, 1.0]
    path = solve_path(some_law(), alpha=1.5, lams=lams, loss=loss)
    assert [found.lam for found in path] == lams
    for found in path:
        single = solve(some_law(), alpha=1.5, lam=found.lam, loss=loss)
        assert found.error == pytest.approx(single.error, abs=1e-5)


def test_an_empty_path_is_empty():
    assert solve_path(some_law(), alpha=1.0, lams=[], loss="ridge") == []


@pytest.mark.parametrize("loss", LOSSES)
def test_a_warm_start_saves_steps_and_changes_nothing_else(loss):
    law = some_law()
    cold = solve(law, alpha=2.0, lam=1e-2, loss=loss)
    warm = solve(law, alpha=2.0, lam=1e-2, loss=loss, start=cold)
    assert warm.iterations < cold.iterations
    assert replace(warm, iterations=0).error == pytest.approx(cold.error, abs=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_iteration_without_convergence_is_an_error_that_names_the_problem(loss):
    said = r"alpha = 2, lam = 0\.01 .* 1 iterations \(last relative change \d"
    with pytest.raises(NotConvergedError, match=said):
        solve(some_law(), alpha=2.0, lam=1e-2, loss=loss, max_iterations=1)


# Rejected input


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_an_invalid_alpha_is_rejected(alpha):
    with pytest.raises(ValueError, match="alpha = n / K > 0"):
        solve(isotropic(), alpha=alpha, lam=0.1, loss="ridge")
    with pytest.raises(ValueError, match="alpha = n / K > 0"):
        solve_real_data(np.ones(2), np.ones(2), 1.0, alpha=alpha, lam=0.1)


@pytest.mark.parametrize("lam", [0.0, 9e-7, -1.0, math.nan, math.inf])
def test_a_too_small_penalty_is_rejected_with_the_reason(lam):
    with pytest.raises(ValueError, match="separable"):
        solve(isotropic(), alpha=1.0, lam=lam, loss="logistic")


def test_an_unknown_loss_is_rejected():
    with pytest.raises(ValueError, match="got 'hinge'"):
        solve(isotropic(), alpha=1.0, lam=0.1, loss="hinge")


def test_a_covariance_with_a_negative_eigenvalue_is_rejected():
    psi, phi, omega, theta = gaussian_model(5, 4)
    spectrum(psi, phi, omega, theta)
    with pytest.raises(NumericsError, match="eigenvalue"):
        spectrum(psi, phi, omega - 2.0 * torch.eye(4).double(), theta)


def test_rounding_errors_are_not_negative_eigenvalues():
    psi, phi, _, theta = gaussian_model(5, 4)
    omega = torch.ones(4, 4).double() - 1e-13 * torch.eye(4).double()
    assert spectrum(psi, phi, omega, theta).omega_K.min() == 0.0


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_teacher_without_variance_is_rejected(value):
    psi, phi, omega, theta = gaussian_model(5, 4)
    with pytest.raises(NumericsError, match="positive variance"):
        spectrum(psi, phi, omega, value * theta)
