"""Exact fits: stationary points, closed forms, symmetries, and errors for invalid problems."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from dist_tl.errors import NotConvergedError, NumericsError
from dist_tl.methods.hidden_manifold import readout
from dist_tl.methods.hidden_manifold.readout import (
    error_rate,
    fit_logistic,
    fit_path,
    fit_ridge,
    scores,
    train_loss,
)
from dist_tl.seeds import torch_rng

FITS = {"ridge": fit_ridge, "logistic": fit_logistic}
SIZES = [(1, 1), (1, 6), (6, 1), (19, 20), (20, 20), (21, 20), (200, 20), (15, 60)]


def problem(num, hidden, noise=0.5, seed=0):
    rng = torch_rng(seed, "problem")
    v = torch.randn(num, hidden, generator=rng, dtype=torch.float64).tanh()
    teacher = torch.randn(hidden, generator=rng, dtype=torch.float64)
    field = v @ teacher / math.sqrt(hidden)
    flips = noise * torch.randn(num, generator=rng, dtype=torch.float64)
    return v, torch.where(field + flips >= 0, 1.0, -1.0).double()


def gradient(w, v, y, lam, loss):
    w = w.clone().requires_grad_()
    z = v @ w / math.sqrt(v.shape[1])
    terms = 0.5 * (y - z) ** 2 if loss == "ridge" else torch.log1p(torch.exp(-y * z))
    (terms.sum() + 0.5 * lam * (w @ w)).backward()
    return w.grad


# Optima


@pytest.mark.parametrize("loss", FITS)
@pytest.mark.parametrize("lam", [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize(("num", "hidden"), SIZES)
def test_the_gradient_of_the_sum_vanishes_at_the_fit(loss, lam, num, hidden):
    v, y = problem(num, hidden)
    w = FITS[loss](v, y, lam)
    assert w.shape == (hidden,)
    assert float(gradient(w, v, y, lam, loss).norm()) < 2e-8


@pytest.mark.parametrize(("num", "hidden"), [(200, 20), (15, 60)])
@pytest.mark.parametrize("lam", [1e-2, 1.0])
def test_scikit_learn_finds_the_same_fits(num, hidden, lam):
    v, y = problem(num, hidden)
    scaled = v / math.sqrt(hidden)
    theirs = Ridge(alpha=lam, fit_intercept=False, tol=1e-12).fit(scaled, y).coef_
    torch.testing.assert_close(fit_ridge(v, y, lam), torch.from_numpy(theirs), rtol=0, atol=1e-8)
    model = LogisticRegression(C=1 / lam, fit_intercept=False, tol=1e-10, max_iter=10_000)
    theirs = torch.from_numpy(model.fit(scaled, y).coef_[0])
    torch.testing.assert_close(fit_logistic(v, y, lam), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [1, 3, 40])
def test_one_feature_has_the_textbook_ridge_weight(n):
    v = torch.ones(n, 1).double()
    assert fit_ridge(v, v[:, 0], 0.5).item() == pytest.approx(n / (n + 0.5), rel=1e-12)


def test_one_sample_of_one_feature_solves_the_scalar_equation():
    w = fit_logistic(torch.ones(1, 1).double(), torch.ones(1).double(), 0.1).item()
    assert 0.1 * w == pytest.approx(1 / (1 + math.exp(w)), rel=1e-8)


@pytest.mark.parametrize(("loss", "slope"), [("ridge", 1.0), ("logistic", 0.5)])
def test_a_large_penalty_leaves_the_slope_at_zero(loss, slope):
    v, y = problem(50, 20)
    expected = slope * v.T @ y / math.sqrt(20) / 1e7
    torch.testing.assert_close(FITS[loss](v, y, 1e7), expected, rtol=1e-4, atol=0)


def test_a_small_penalty_interpolates_if_possible():
    v, y = problem(15, 60)
    w = fit_ridge(v, y, 1e-9)
    torch.testing.assert_close(scores(w, v), y, rtol=0, atol=1e-6)
    least = torch.linalg.pinv(v / math.sqrt(60)) @ y
    torch.testing.assert_close(w, least, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lam", [1e-6, 1e-5, 1e-4])
@pytest.mark.parametrize(("num", "hidden"), [(15, 60), (60, 60), (100, 60), (200, 20)])
def test_separable_data_converge_at_the_smallest_penalties(num, hidden, lam):
    v, y = problem(num, hidden, noise=0.0)
    w = fit_logistic(v, y, lam)
    assert float(gradient(w, v, y, lam, "logistic").norm()) < 2e-8
    assert error_rate(w, v, y) == 0


def test_features_of_any_scale_converge():
    v, y = problem(100, 20)
    for scale in (1e-3, 1e3):
        w = fit_logistic(scale * v, y, 1.0)
        # The rounding of the terms, of size `scale`, sets the floor.
        assert float(gradient(w, scale * v, y, 1.0, "logistic").norm()) < 1e-8 * max(scale, 2)


# Symmetries


@pytest.mark.parametrize("loss", FITS)
@pytest.mark.parametrize(("num", "hidden"), [(40, 12), (12, 40)])
def test_fits_are_equivariant_to_rotations_and_label_flips(loss, num, hidden):
    v, y = problem(num, hidden)
    fit = FITS[loss]
    w = fit(v, y, 0.1)
    rng = torch_rng(0, "rotation")
    rotation = torch.linalg.qr(torch.randn(hidden, hidden, generator=rng).double()).Q
    close = {"rtol": 0, "atol": 1e-7}
    torch.testing.assert_close(fit(v, -y, 0.1), -w, **close)
    torch.testing.assert_close(fit(-v, y, 0.1), -w, **close)
    torch.testing.assert_close(fit(v @ rotation, y, 0.1), rotation.T @ w, **close)
    torch.testing.assert_close(fit(v.flip(0), y.flip(0), 0.1), w, **close)


@pytest.mark.parametrize("loss", FITS)
def test_duplicated_samples_are_equivalent_to_half_the_penalty(loss):
    v, y = problem(30, 45)
    twice = FITS[loss](v.repeat(2, 1), y.repeat(2), 0.2)
    torch.testing.assert_close(twice, FITS[loss](v, y, 0.1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("loss", FITS)
def test_without_samples_the_weights_are_zero(loss):
    w = FITS[loss](torch.zeros(0, 3).double(), torch.zeros(0).double(), 1.0)
    assert w.tolist() == [0.0, 0.0, 0.0]


# Paths


@pytest.mark.parametrize("loss", FITS)
@pytest.mark.parametrize(("num", "hidden"), [(40, 12), (12, 12), (12, 40)])
def test_a_path_holds_the_single_fits_in_the_given_order(loss, num, hidden):
    v, y = problem(num, hidden)
    lams = [1e-2, 10.0, 1e-4, 1.0]
    path = fit_path(v, y, lams, loss)
    assert path.shape == (4, hidden)
    for w, lam in zip(path, lams, strict=True):
        # Both gradients are below 1e-8, and the objective curves at least like lam.
        torch.testing.assert_close(w, FITS[loss](v, y, lam), rtol=0, atol=2e-8 / lam)
        assert float(gradient(w, v, y, lam, loss).norm()) < 2e-8


@pytest.mark.parametrize("loss", FITS)
def test_an_empty_path_is_empty(loss):
    assert fit_path(*problem(5, 3), [], loss).shape == (0, 3)


# Measures


def test_errors_are_the_share_of_wrong_signs():
    v = torch.tensor([[1.0], [2.0], [-1.0], [0.0]]).double()
    w = torch.ones(1).double()
    assert error_rate(w, v, torch.tensor([1.0, -1.0, -1.0, 1.0])) == 0.25
    assert (
        error_rate(w, v, torch.tensor([1.0, 1.0, -1.0, -1.0])) == 0.25
    )  # a score of 0 counts as +1


def test_train_loss_is_the_mean_without_the_penalty():
    v = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]).double()
    w = torch.tensor([3.0, 1.0, 50.0, 0.0]).double()  # scores 3 and 1
    y = torch.tensor([1.0, -1.0]).double()
    assert train_loss(w, v, y, "ridge") == pytest.approx((2**2 + 2**2) / 4)
    expected = (math.log1p(math.exp(-3)) + math.log1p(math.exp(1))) / 2
    assert train_loss(w, v, y, "logistic") == pytest.approx(expected)


@pytest.mark.parametrize("margin", [-1e4, -30.0, 30.0, 1e4])
def test_the_logistic_loss_neither_overflows_nor_vanishes_too_early(margin):
    one = torch.ones(1, 1).double()
    expected = max(0.0, -margin) + math.log1p(math.exp(-abs(margin)))
    loss = train_loss(margin * one[0], one, one[0], "logistic")
    assert loss == pytest.approx(expected, rel=1e-12, abs=0)


def test_measures_of_no_samples_are_rejected():
    v, y, w = torch.zeros(0, 2).double(), torch.zeros(0).double(), torch.zeros(2).double()
    with pytest.raises(ValueError, match="at least one sample"):
        error_rate(w, v, y)
    with pytest.raises(ValueError, match="at least one sample"):
        train_loss(w, v, y, "ridge")


# Rejected input


@pytest.mark.parametrize("loss", FITS)
@pytest.mark.parametrize("lam", [0.0, -1.0, math.nan, math.inf])
def test_invalid_penalties_are_rejected(loss, lam):
    with pytest.raises(ValueError, match="lam > 0"):
        FITS[loss](*problem(5, 3), lam)
    with pytest.raises(ValueError, match="lam > 0"):
        fit_path(*problem(5, 3), [1.0, lam], loss)


def test_labels_of_zero_and_one_are_rejected_by_logistic_only():
    v, y = problem(5, 3)
    with pytest.raises(ValueError, match="2 y - 1"):
        fit_logistic(v, (y + 1) / 2, 1.0)
    fit_ridge(v, y - y.mean(), 1.0)


@pytest.mark.parametrize("loss", FITS)
def test_tensors_that_do_not_fit_are_rejected(loss):
    v, y = problem(5, 3)
    with pytest.raises(ValueError, match="float64"):
        FITS[loss](v.float(), y, 1.0)
    with pytest.raises(ValueError, match="K >= 1"):
        FITS[loss](v, y[:1], 1.0)
    with pytest.raises(ValueError, match="K >= 1"):
        FITS[loss](v[:, :0], y, 1.0)
    with pytest.raises(NumericsError, match="NaN"):
        FITS[loss](v * math.nan, y, 1.0)


def test_an_unknown_loss_is_rejected():
    v, y = problem(5, 3)
    with pytest.raises(ValueError, match="got 'hinge'"):
        fit_path(v, y, [1.0], "hinge")
    with pytest.raises(ValueError, match="got 'hinge'"):
        train_loss(v[0], v, y, "hinge")


def test_a_fit_without_convergence_is_an_error(monkeypatch):
    monkeypatch.setattr(readout, "MAX_STEPS", 2)
    with pytest.raises(NotConvergedError, match=r"lam = 0.0001 on 40 samples: gradient norm"):
        fit_logistic(*problem(40, 12), 1e-4)


def test_features_whose_squares_overflow_are_rejected():
    v, y = problem(5, 3)
    with pytest.raises(NumericsError, match="squares overflow"):
        fit_ridge(1e200 * v, y, 1.0)
