"""Forecasts compared with measurements, and their invariances."""

import math

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dist_tl.errors import ConfigError, NumericsError
from dist_tl.methods.hidden_manifold.forecast import (
    Forecast,
    Measured,
    crossing,
    forecast_curve,
    held_out_curve,
    is_reliable,
    one_vs_rest,
    principal_components,
    samples_for_mse,
    teacher_terms,
)
from dist_tl.seeds import numpy_rng


def gaussian_task(num, features=6, seed=0):
    """Correlated Gaussian features with a mean, and three classes that depend on them."""
    rng = numpy_rng(seed, "task")
    mixing = numpy_rng(0, "mixing").normal(size=(features, features))
    x = rng.normal(size=(num, features)) @ mixing + 2.0
    return x, np.digitize(x[:, 0] + 0.5 * rng.normal(size=num), [1.0, 3.0])


def forecast_of(x, labels, **changes):
    options = {"num_classes": 3, "sizes": [5, 20, 80], "lams": [1e-2, 1.0]} | changes
    return forecast_curve(x, x, labels, **options)


def curve(sizes, mse):
    flat = np.asarray(mse, float)
    return Forecast(np.array(sizes), flat, np.ones(len(flat)), flat, flat)


def measured(sizes, mse, error):
    mse = np.asarray(mse, float)
    return Measured(np.array(sizes), mse, np.full(len(mse), error), np.ones(len(mse)))


# Digits: reference values of the method


@pytest.fixture(scope="module")
def digits():
    """40 components of 100 random tanh features, and the labels.

    The reference does not say whether pixels were centred. Its values are met if they are; if not,
    ours are lower, for forecast and measurement alike: held out .232, .183, .152 over ten W.
    """
    images, labels = load_digits(return_X_y=True)
    weights = numpy_rng(0, "digits").normal(size=(64, 100))
    features = np.tanh((images - images.mean(axis=0)) / 16 @ weights / 4)
    return principal_components(features, 40).apply(features), labels


SIZES, FORECAST, SPREAD, HELD_OUT = (
    [50, 100, 200],
    np.array([0.264, 0.203, 0.170]),
    np.array([0.018, 0.015, 0.012]),
    np.array([0.263, 0.201, 0.167]),
)


def test_digits_are_forecast_from_two_hundred_labels(digits):
    features, labels = digits
    kept = numpy_rng(0, "labelled").permutation(len(labels))[:200]
    forecast = forecast_curve(
        features, features[kept], labels[kept], num_classes=10, sizes=SIZES, lams=[1e-2]
    )
    assert np.all(np.abs(forecast.mse_S - FORECAST) < 3 * SPREAD)


def test_held_out_digits_agree_with_the_forecast(digits):
    features, labels = digits
    options = {"num_classes": 10, "sizes": SIZES}
    found = held_out_curve(
        features, labels, lams=[1e-2] * 3, draws=10, rng=numpy_rng(0, "draws"), **options
    )
    assert np.all(np.abs(found.mse_S - HELD_OUT) < 3 * SPREAD)
    assert found.accuracy_S[0] > 0.7
    # With all labels the forecast has no noise, so this compares theory and measurement.
    forecast = forecast_curve(features, features, labels, lams=[1e-2], **options)
    np.testing.assert_allclose(forecast.mse_S, found.mse_S, rtol=0.05)
    assert is_reliable(forecast, found) == [True] * 3


def test_without_the_correction_noise_biases_the_forecast(digits):
    features, labels = digits
    kept = numpy_rng(0, "labelled").permutation(len(labels))[:200]
    centred, y = features - features.mean(axis=0), one_vs_rest(labels[kept], 3)
    corrected, _ = teacher_terms(centred[kept], y)
    plain = (y[:, None] * centred[kept]).mean(axis=0) ** 2
    exact, _ = teacher_terms(centred, one_vs_rest(labels, 3))
    assert abs(corrected.sum() - exact.sum()) < 0.5 * abs(plain.sum() - exact.sum())


# Correlations without their noise


@pytest.mark.parametrize("num", [2, 3, 10])
def test_corrected_terms_are_the_mean_over_pairs_of_different_items(num):
    rng = numpy_rng(num, "pairs")
    z, y = rng.normal(size=(num, 4)), rng.normal(size=num)
    product = y[:, None] * z
    pairs = [product[a] * product[b] for a in range(num) for b in range(num) if a != b]
    t, rho = teacher_terms(z, y)
    np.testing.assert_allclose(t, np.mean(pairs, axis=0), rtol=1e-9, atol=1e-14)
    assert rho == pytest.approx(np.mean(y**2))


def test_corrected_terms_have_no_bias():
    rng = numpy_rng(0, "bias")
    draws = []
    for _ in range(3000):
        z = rng.normal(size=(20, 2))
        draws.append(teacher_terms(z, 0.3 * z[:, 0] + rng.normal(size=20))[0])
    mean, error = np.mean(draws, axis=0), np.std(draws, axis=0) / math.sqrt(len(draws))
    assert np.all(np.abs(mean - [0.09, 0.0]) < 3 * error)
    assert np.min(draws) < 0


def test_labels_are_centred_signs():
    np.testing.assert_allclose(one_vs_rest(np.array([0, 2, 1, 2]), 2), [-1, 1, -1, 1])
    np.testing.assert_allclose(one_vs_rest(np.array([0, 1, 1, 1]), 0), [1.5, -0.5, -0.5, -0.5])


# Curves


def test_gaussian_features_are_forecast_as_measured():
    x, labels = gaussian_task(4000, features=30)
    lams = [1e-1]
    forecast = forecast_of(x, labels, sizes=[30, 60, 300], lams=lams)
    found = held_out_curve(
        x - x.mean(axis=0),
        labels,
        num_classes=3,
        sizes=[30, 60, 300],
        lams=lams * 3,
        draws=60,
        rng=numpy_rng(0, "draws"),
    )
    gap = np.abs(forecast.mse_S - found.mse_S)
    assert np.all(gap < 3 * found.error_S + 0.02 * found.mse_S)


def test_many_labels_reach_the_best_linear_fit():
    x, labels = gaussian_task(2000)
    forecast = forecast_of(x, labels, sizes=[10**6], lams=[1e-4])
    residual = []
    for c in range(3):
        y, centred = one_vs_rest(labels, c), x - x.mean(axis=0)
        residual.append(np.mean((y - centred @ np.linalg.lstsq(centred, y, rcond=None)[0]) ** 2))
    assert forecast.mse_S[0] == pytest.approx(np.mean(residual), rel=0.01)


def test_the_best_penalty_is_reported_for_each_size():
    x, labels = gaussian_task(500)
    lams = [1e-3, 1e-1, 10.0, 1000.0]
    best = forecast_of(x, labels, lams=lams)
    single = np.array([forecast_of(x, labels, lams=[lam]).mse_S for lam in lams])
    np.testing.assert_allclose(best.mse_S, single.min(axis=0))
    np.testing.assert_allclose(best.lam_S, np.array(lams)[single.argmin(axis=0)])
    assert np.all(np.diff(best.mse_S) < 0)


def test_forecasts_are_invariant_to_shifts_rotations_and_class_names():
    x, labels = gaussian_task(400)
    turn = np.linalg.qr(numpy_rng(0, "turn").normal(size=(6, 6)))[0]
    one = forecast_of(x, labels)
    np.testing.assert_allclose(forecast_of(x + 7.0, labels).mse_S, one.mse_S, rtol=1e-6)
    np.testing.assert_allclose(forecast_of(x @ turn, labels).mse_S, one.mse_S, rtol=1e-6)
    np.testing.assert_allclose(forecast_of(x, 2 - labels).mse_S, one.mse_S, rtol=1e-6)


def test_one_feature_is_enough():
    x, labels = gaussian_task(100, features=1)
    assert 0 < forecast_of(x, labels).mse_S[0] < 2


def test_a_size_may_equal_the_number_of_features_at_the_smallest_penalty():
    x, labels = gaussian_task(400)
    assert np.isfinite(forecast_of(x, labels, sizes=[6], lams=[1e-6]).mse_S).all()


# The band over labels


def test_the_band_contains_its_curve_and_mostly_the_forecast_from_all_labels(digits):
    features, labels = digits
    options = {"num_classes": 10, "sizes": SIZES, "lams": [1e-2]}
    exact = forecast_curve(features, features, labels, **options).mse_S
    held = 0
    for seed in range(8):
        kept = numpy_rng(seed, "labelled").permutation(len(labels))[:200]
        rng = numpy_rng(seed, "bootstrap")
        band = forecast_curve(
            features, features[kept], labels[kept], num_bootstrap=30, rng=rng, **options
        )
        assert np.all((band.low_S <= band.mse_S) & (band.mse_S <= band.high_S))
        held += bool(np.all((band.low_S <= exact) & (exact <= band.high_S)))
    assert held >= 6


def test_the_same_generator_gives_the_same_band():
    x, labels = gaussian_task(200)
    one, other = (
        forecast_of(x, labels, num_bootstrap=5, rng=numpy_rng(0, "bootstrap")) for _ in range(2)
    )
    assert one.low_S.tolist() == other.low_S.tolist()
    assert one.high_S.tolist() == other.high_S.tolist()


def test_without_bootstrap_the_band_is_the_curve():
    forecast = forecast_of(*gaussian_task(200))
    assert forecast.low_S.tolist() == forecast.mse_S.tolist() == forecast.high_S.tolist()


def test_a_bootstrap_without_a_generator_is_rejected():
    with pytest.raises(ValueError, match="rng"):
        forecast_of(*gaussian_task(200), num_bootstrap=5)


# Components


def test_components_are_uncorrelated_and_keep_the_largest_variances():
    x, _ = gaussian_task(500)
    components = principal_components(x, 3).apply(x)
    cov = np.cov(components, rowvar=False, bias=True)
    largest = np.linalg.eigvalsh(np.cov(x, rowvar=False, bias=True))[::-1][:3]
    np.testing.assert_allclose(cov, np.diag(largest) * 3 / 6, atol=1e-9)
    np.testing.assert_allclose(components.mean(axis=0), 0, atol=1e-10)


def test_all_components_are_the_features():
    x, labels = gaussian_task(400)
    rotated = principal_components(x, 6).apply(x)
    np.testing.assert_allclose(
        forecast_of(rotated, labels).mse_S, forecast_of(x, labels).mse_S, rtol=1e-6
    )


def test_omitting_directions_without_variance_changes_nothing():
    x, labels = gaussian_task(600)
    padded = np.hstack([x, np.zeros_like(x)])
    np.testing.assert_allclose(
        forecast_of(principal_components(padded, 6).apply(padded), labels).mse_S,
        forecast_of(padded, labels).mse_S,
        rtol=1e-6,
    )


@pytest.mark.parametrize("count", [0, 7])
def test_invalid_numbers_of_components_are_rejected(count):
    with pytest.raises(ConfigError, match="1 to 6"):
        principal_components(gaussian_task(100)[0], count)


# Held-out fits


def fits(x, labels, **changes):
    options = {"num_classes": 3, "sizes": [20, 60], "lams": [0.1, 0.1], "draws": 4}
    return held_out_curve(x, labels, rng=numpy_rng(0, "draws"), **options | changes)


def test_held_out_fits_are_the_same_for_the_same_generator():
    x, labels = gaussian_task(300)
    one, other = fits(x, labels), fits(x, labels)
    assert one.mse_S.tolist() == other.mse_S.tolist()


def test_held_out_fits_ignore_the_features_mean_like_the_forecast():
    x, labels = gaussian_task(300)
    one, other = fits(x, labels), fits(x + 7.0, labels)
    np.testing.assert_allclose(other.mse_S, one.mse_S, rtol=1e-6)


def test_features_that_separate_classes_have_accuracy_one():
    labels = np.arange(90) % 3
    found = fits(np.eye(3)[labels] * 10, labels, sizes=[30], lams=[1e-4])
    assert found.accuracy_S.tolist() == [1.0]


def test_the_standard_error_is_that_of_the_mean_over_draws():
    x, labels = gaussian_task(300)
    few, many = fits(x, labels, draws=10), fits(x, labels, draws=160)
    ratio = few.error_S / many.error_S
    assert np.all((ratio > 2) & (ratio < 8))


@pytest.mark.parametrize("sizes", [[0, 20], [20, 300], []])
def test_sizes_without_train_or_test_items_are_rejected(sizes):
    x, labels = gaussian_task(300)
    with pytest.raises(ConfigError, match="sizes"):
        fits(x, labels, sizes=sizes, lams=[0.1] * len(sizes))


def test_no_draws_are_rejected():
    with pytest.raises(ConfigError, match="draws"):
        fits(*gaussian_task(300), draws=0)


# Reading curves


def test_samples_for_an_error_are_interpolated_in_log_n():
    forecast = curve([10, 100, 1000], [0.8, 0.4, 0.3])
    assert samples_for_mse(forecast, 0.6) == pytest.approx(10**1.5)
    assert samples_for_mse(forecast, 0.4) == pytest.approx(100)
    assert samples_for_mse(forecast, 0.35) == pytest.approx(10**2.5)


def test_samples_for_an_error_is_the_smallest_size_or_none_at_the_ends():
    forecast = curve([10, 100], [0.8, 0.4])
    assert samples_for_mse(forecast, 0.9) == 10
    assert samples_for_mse(forecast, 0.39) is None
    assert samples_for_mse(curve([10], [0.8]), 0.5) is None


def test_crossings_are_interpolated_in_log_n_from_either_side():
    one, other = curve([10, 1000], [0.8, 0.2]), curve([10, 1000], [0.5, 0.5])
    assert crossing(one, other) == pytest.approx(100)
    assert crossing(other, one) == pytest.approx(100)


def test_curves_that_do_not_cross_have_no_crossing():
    one = curve([10, 100, 1000], [0.8, 0.4, 0.3])
    assert crossing(one, curve([10, 100, 1000], [0.9, 0.5, 0.4])) is None
    assert crossing(one, one) is None
    assert crossing(one, curve([10, 100, 1000], [0.9, 0.4, 0.4])) is None  # only touches


def test_curves_can_cross_at_a_size():
    one, other = curve([10, 100, 1000], [3, 2, 1]), curve([10, 100, 1000], [2, 2, 2])
    assert crossing(one, other) == pytest.approx(100)


def test_curves_over_different_sizes_are_rejected():
    with pytest.raises(ValueError, match="sizes"):
        crossing(curve([10, 100], [3, 1]), curve([10, 1000], [2, 2]))


@pytest.mark.parametrize(
    ("mse", "error", "verdict"),
    [
        (1.0, 0.0, True),
        (1.2, 0.01, False),
        (1.2, 0.1, True),  # within 3 standard errors
        (1.08, 0.001, True),  # within 10 %
        (0.8, 0.01, False),
    ],
)
def test_a_forecast_is_unreliable_only_if_its_error_is_large_and_significant(mse, error, verdict):
    assert is_reliable(curve([10, 20], [9.0, 1.0]), measured([20], [mse], error)) == [verdict]


# Rejected input


@pytest.mark.parametrize(("num_pool", "num_labelled"), [(59, 30), (60, 29)])
def test_too_few_items_are_rejected_with_a_remedy(num_pool, num_labelled):
    x, labels = gaussian_task(100)
    options = {"num_classes": 3, "sizes": [5], "lams": [0.1]}
    forecast_curve(x[:60], x[:30], labels[:30], **options)
    with pytest.raises(ConfigError, match="`components` to 5"):
        forecast_curve(x[:num_pool], x[:num_labelled], labels[:num_labelled], **options)


@pytest.mark.parametrize("sizes", [[0], [5, -1], []])
def test_sizes_below_one_are_rejected(sizes):
    with pytest.raises(ConfigError, match="sizes"):
        forecast_of(*gaussian_task(100), sizes=sizes)


@pytest.mark.parametrize("sizes", [[20, 5], [5, 5]])
def test_sizes_that_do_not_ascend_are_rejected(sizes):
    with pytest.raises(ConfigError, match="ascending"):
        forecast_of(*gaussian_task(100), sizes=sizes)


@pytest.mark.parametrize("lams", [[], [0.0]])
def test_penalties_outside_the_theory_are_rejected(lams):
    with pytest.raises(ValueError, match="lam"):
        forecast_of(*gaussian_task(100), lams=lams)


def test_classes_out_of_range_or_without_a_labelled_item_are_rejected():
    x, labels = gaussian_task(100)
    with pytest.raises(ConfigError, match="class"):
        forecast_of(x, labels, num_classes=2)
    with pytest.raises(ConfigError, match="class"):
        forecast_of(x, labels, num_classes=4)
    with pytest.raises(ConfigError, match="class"):
        forecast_of(x, 0 * labels, num_classes=1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_rejected(value):
    x, labels = gaussian_task(100)
    bad = x.copy()
    bad[3, 2] = value
    with pytest.raises(NumericsError, match="NaN"):
        forecast_curve(bad, x, labels, num_classes=3, sizes=[5], lams=[0.1])
    with pytest.raises(NumericsError, match="NaN"):
        forecast_curve(x, bad, labels, num_classes=3, sizes=[5], lams=[0.1])


def test_features_that_do_not_vary_are_rejected():
    x, labels = gaussian_task(100)
    with pytest.raises(NumericsError, match="varies"):
        forecast_of(np.ones_like(x), labels)


def test_unequal_numbers_of_features_and_labels_are_rejected():
    x, labels = gaussian_task(100)
    with pytest.raises(ValueError, match="expected labelled features"):
        forecast_of(x, labels[:-1])
