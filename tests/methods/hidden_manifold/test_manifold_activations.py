"""Gaussian coefficients of each activation: closed forms, limits and adaptive quadrature."""

import math
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import integrate, special

from dist_tl.methods.hidden_manifold.activations import (
    ODD,
    Activation,
    apply,
    gaussian_coefficients,
)

ACTIVATIONS = get_args(Activation)
VARIANCES = [1e-8, 1e-3, 0.3, 1.0, 4.0, 100.0, 1e8]


def expectation(function, variance):
    """E f(s), s ~ N(0, variance), by an adaptive rule split at zero."""
    sigma = math.sqrt(variance)

    def density(g):
        return math.exp(-(g**2) / 2) / math.sqrt(2 * math.pi) * function(sigma * g)

    options = {"epsabs": 1e-14, "epsrel": 1e-13, "limit": 400}
    knee = min(1.0, 1 / sigma)
    edges = [-12, -5 * knee, -knee, 0, knee, 5 * knee, 12]
    return sum(integrate.quad(density, *pair, **options)[0] for pair in pairwise(edges))


def test_each_name_is_the_function_of_that_name():
    x = np.linspace(-3, 3, 13)
    expected = {"tanh": np.tanh(x), "relu": np.maximum(x, 0), "erf": special.erf(x), "identity": x}
    for name in ACTIVATIONS:
        np.testing.assert_allclose(apply(name, torch.from_numpy(x)), expected[name], rtol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_shape_and_dtype_are_those_of_the_input(name):
    for x in (torch.zeros(0, 3), torch.zeros(2, dtype=torch.float64)):
        assert apply(name, x).shape == x.shape
        assert apply(name, x).dtype == x.dtype


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_odd_lists_exactly_the_odd_activations(name):
    x = torch.linspace(-3, 3, 12)
    assert torch.equal(apply(name, -x), -apply(name, x)) == (name in ODD)


def test_an_unknown_activation_is_rejected():
    with pytest.raises(ValueError, match="tanh, relu, erf, identity, got 'gelu'"):
        apply("gelu", torch.zeros(1))
    with pytest.raises(ValueError, match="gelu"):
        gaussian_coefficients("gelu", 1.0)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("variance", [1e-3, 0.3, 1.0, 4.0, 100.0])
def test_coefficients_agree_with_an_adaptive_rule(name, variance):
    def f(s):
        return float(apply(name, torch.tensor(s, dtype=torch.float64)))

    mean, k1, kstar = gaussian_coefficients(name, variance)
    assert mean == pytest.approx(expectation(f, variance), abs=1e-11)
    assert k1 == pytest.approx(expectation(lambda s: s * f(s), variance) / variance, rel=1e-10)
    rest = expectation(lambda s: (f(s) - mean - k1 * s) ** 2, variance)
    assert kstar**2 == pytest.approx(rest, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("variance", VARIANCES)
def test_erf_has_its_closed_forms(variance):
    mean, k1, kstar = gaussian_coefficients("erf", variance)
    assert mean == 0
    assert k1 == pytest.approx(2 / math.sqrt(math.pi * (1 + 2 * variance)), rel=1e-11)
    square = 2 / math.pi * math.asin(2 * variance / (1 + 2 * variance))
    assert kstar**2 + k1**2 * variance == pytest.approx(square, rel=1e-10)


@pytest.mark.parametrize("variance", VARIANCES)
def test_relu_has_its_closed_forms(variance):
    mean, k1, kstar = gaussian_coefficients("relu", variance)
    assert mean == pytest.approx(math.sqrt(variance / (2 * math.pi)))
    assert k1 == 0.5
    assert mean**2 + k1**2 * variance + kstar**2 == pytest.approx(variance / 2)


def test_identity_has_slope_one_and_no_noise():
    assert gaussian_coefficients("identity", 7.0) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("variance", [1e-10, 1e-7, 1e-5])
def test_for_small_variance_the_third_hermite_term_of_tanh_remains(variance):
    # tanh s = s - s^3/3 + ..., whose part beyond the slope has variance (2/3) r^3.
    _, k1, kstar = gaussian_coefficients("tanh", variance)
    assert k1 == pytest.approx(1 - variance, rel=variance**1.5)
    assert kstar == pytest.approx(math.sqrt(2 / 3) * variance**1.5, rel=1e-4)


@pytest.mark.parametrize("name", ["tanh", "erf"])
def test_for_large_variance_activations_approach_the_sign(name):
    _, k1, kstar = gaussian_coefficients(name, 1e14)
    assert k1 * 1e7 == pytest.approx(math.sqrt(2 / math.pi), rel=1e-6)
    assert kstar**2 == pytest.approx(1 - 2 / math.pi, rel=1e-6)


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf])
def test_invalid_variances_are_rejected(variance):
    with pytest.raises(ValueError, match="finite variance > 0"):
        gaussian_coefficients("tanh", variance)
