"""Moments: bit-identical for any number of workers, and three routes to one covariance."""

import math

import numpy as np
import pytest
import torch

from dist_tl.errors import NumericsError
from dist_tl.methods.hidden_manifold.gaussian_model import (
    binned_moments,
    chunk_bins,
    chunk_moments,
    erf_covariances,
    hidden_features,
    monte_carlo,
    random_feature_covariances,
    random_features,
)
from dist_tl.methods.hidden_manifold.moments import Covariances, MomentSums
from dist_tl.methods.hidden_manifold.sampling import ManifoldConfig, draw_tasks, sample_chunk
from dist_tl.seeds import torch_rng

MATRICES = ["psi_dd", "phi_dK", "omega_KK"]


def task_of(activation="tanh", latent=20, inputs=60):
    config = ManifoldConfig(source_latent=latent, inputs=inputs, input_activation=activation)
    return draw_tasks(config, seed=1).source


def weights_of(hidden=30, inputs=60):
    return random_features(inputs, hidden, rng=torch_rng(0, "W"))


def monte_carlo_of(task, activation="tanh", *, num=40_000, weights=None, **options):
    weights = weights_of() if weights is None else weights
    return monte_carlo(
        task, weights, activation, num_samples=num, seed=0, purpose="moments", **options
    )


def chunks_of(task, sizes, make=chunk_moments, **options):
    return [
        make(task, weights_of(), "tanh", num, rng=torch_rng(0, "moments", i), **options)
        for i, num in enumerate(sizes)
    ]


def assert_same_bits(one, other):
    assert vars(one).keys() == vars(other).keys()
    for name, value in vars(one).items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(vars(other)[name])), name


def relative(difference, reference):
    return float(difference.norm() / reference.norm())


# Features


def test_features_are_the_activation_of_scaled_products():
    w = torch.tensor([[1.0, 2.0, 0.0, 1.0], [0.0, -1.0, 1.0, 0.0]])
    x = torch.tensor([[2.0, 1.0, 5.0, 0.0]])
    v = hidden_features(w, x, "identity")
    assert v.tolist() == [[2.0, 2.0]]
    assert v.dtype == torch.float64
    assert torch.equal(hidden_features(w, x, "tanh"), v.tanh())


def test_weights_for_other_inputs_are_rejected():
    with pytest.raises(ValueError, match=r"\(2, 3\), \(5, 4\)"):
        hidden_features(torch.zeros(2, 3), torch.zeros(5, 4), "tanh")


def test_random_features_are_standard_normal_and_depend_on_the_generator_only():
    w = random_features(200, 100, rng=torch_rng(0, "W"))
    assert w.shape == (100, 200)
    assert w.dtype == torch.float64
    assert float(w.mean()) == pytest.approx(0, abs=4 / math.sqrt(w.numel()))
    assert float(w.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / w.numel()))
    assert torch.equal(w, random_features(200, 100, rng=torch_rng(0, "W")))


# Sums


@pytest.mark.parametrize("num", [1, 99, 100, 101, 350])
def test_a_stream_equals_its_chunks_merged_in_order_bit_for_bit(num):
    task = task_of()
    sizes = [100] * (num // 100) + [num % 100] * (num % 100 > 0)
    merged = MomentSums.merge(chunks_of(task, sizes))
    assert merged.count == num
    assert_same_bits(merged, monte_carlo_of(task, num=num, chunk=100))


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_the_number_of_workers_changes_no_bit(workers):
    task, sizes = task_of(), [50] * 5
    by_index = {}
    for worker in reversed(range(workers)):
        for i in range(worker, 5, workers):
            rng = torch_rng(0, "moments", i)
            by_index[i] = chunk_moments(task, weights_of(), "tanh", 50, rng=rng)
    merged = MomentSums.merge([by_index[i] for i in range(5)])
    assert_same_bits(merged, MomentSums.merge(chunks_of(task, sizes)))


def test_merging_does_not_change_the_parts():
    parts, again = (chunks_of(task_of(), [30, 20]) for _ in range(2))
    merged = MomentSums.merge(parts)
    merged.sum_vv_KK.zero_()
    MomentSums.merge(parts[:1]).sum_vv_KK.zero_()
    for part, expected in zip(parts, again, strict=True):
        assert_same_bits(part, expected)


def test_an_empty_chunk_adds_nothing():
    full, empty = chunks_of(task_of(), [30, 0])
    assert_same_bits(MomentSums.merge([full, empty]), full)


def test_parts_that_do_not_fit_are_rejected():
    with pytest.raises(ValueError, match="at least one part"):
        MomentSums.merge([])
    # A width of 1 would silently broadcast.
    with pytest.raises(ValueError, match="equal shape"):
        MomentSums.merge([MomentSums.zeros(latent=2, hidden=k) for k in (5, 1)])


def test_samples_that_do_not_fit_are_rejected():
    sums = MomentSums.zeros(latent=2, hidden=3)
    for v, c in [((4, 1), (4, 2)), ((4, 3), (4, 1)), ((4, 3), (1, 2))]:
        with pytest.raises(ValueError, match=r"expected c \(N, 2\)"):
            sums.add(torch.zeros(v), torch.zeros(c))
    with pytest.raises(ValueError, match="labels"):
        sums.add(torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(1))


@pytest.mark.parametrize(("num", "chunk"), [(0, 10), (10, 0), (-1, 10)])
def test_no_samples_or_empty_chunks_are_rejected(num, chunk):
    with pytest.raises(ValueError, match="num_samples and chunk >= 1"):
        monte_carlo_of(task_of(), num=num, chunk=chunk)


# Covariances of samples


def some_sums(mean=0.0, num=500):
    rng = torch_rng(0, "data")
    v = torch.randn(num, 4, generator=rng).double() + mean
    c = torch.randn(num, 3, generator=rng).double()
    y = torch.randn(num, generator=rng).double() + 0.5
    sums = MomentSums.zeros(latent=3, hidden=4)
    sums.add(v[:200], c[:200], y[:200])
    sums.add(v[200:], c[200:], y[200:])
    return sums, v, c, y


def test_uncentred_covariances_are_plain_averages():
    sums, v, c, _ = some_sums()
    found = sums.covariances()
    torch.testing.assert_close(found.psi_dd, c.T @ c / 500)
    torch.testing.assert_close(found.phi_dK, c.T @ v / 500)
    torch.testing.assert_close(found.omega_KK, v.T @ v / 500)


def test_centred_covariances_are_those_of_numpy():
    sums, v, c, _ = some_sums(mean=3.0)
    found = sums.covariances(centred=True)
    joint = torch.from_numpy(np.cov(np.hstack([c, v]), rowvar=False, ddof=0))
    torch.testing.assert_close(found.psi_dd, joint[:3, :3])
    torch.testing.assert_close(found.phi_dK, joint[:3, 3:])
    torch.testing.assert_close(found.omega_KK, joint[3:, 3:])


def test_centring_removes_any_shift():
    shifted, plain = (some_sums(mean=m)[0].covariances(centred=True) for m in (5.0, 0.0))
    for name in MATRICES:
        torch.testing.assert_close(getattr(shifted, name), getattr(plain, name))


def test_features_with_a_mean_are_rejected_unless_centred():
    sums = monte_carlo_of(task_of(), "relu", num=2000)
    with pytest.raises(NumericsError, match=r"feature \d+ has mean .* centred=True"):
        sums.covariances()
    assert sums.covariances(centred=True).omega_KK.shape == (30, 30)


@pytest.mark.parametrize("num", [1, 2, 30, 4000])
@pytest.mark.parametrize("activation", ["tanh", "erf", "identity"])
def test_odd_features_never_count_as_features_with_a_mean(activation, num):
    monte_carlo_of(task_of(), activation, num=num).covariances()


def test_dead_features_have_no_mean():
    sums = MomentSums.zeros(latent=1, hidden=2)
    sums.add(torch.zeros(500, 2), torch.zeros(500, 1))
    assert sums.covariances().omega_KK.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_covariances_of_the_same_samples_have_no_negative_residual():
    # What is left of v after its best linear fit by c: estimates from different samples could
    # make it negative, same-sample Psi cannot.
    found = monte_carlo_of(task_of(), num=60).covariances()
    rest = found.omega_KK - found.phi_dK.T @ torch.linalg.solve(found.psi_dd, found.phi_dK)
    assert float(torch.linalg.eigvalsh(rest)[0]) > -1e-12
    assert not torch.allclose(found.psi_dd, torch.eye(20).double(), atol=0.1)


def test_no_samples_have_no_covariance():
    with pytest.raises(ValueError, match="at least one sample"):
        MomentSums.zeros(latent=1, hidden=1).covariances()


def test_invalid_covariances_are_rejected():
    one = torch.eye(1).double()
    phi = torch.zeros(1, 2).double()
    with pytest.raises(NumericsError, match="eigenvalue -1"):
        Covariances(one, phi, torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double())
    with pytest.raises(NumericsError, match="NaN"):
        Covariances(one, phi * math.nan, torch.eye(2).double())
    with pytest.raises(ValueError, match="expected psi"):
        Covariances(one, phi, torch.eye(3).double())


# Labels


def test_label_moments_are_averages_and_centre_with_the_rest():
    sums, v, _, y = some_sums(mean=2.0)
    rho, phi = sums.label_moments()
    assert rho == pytest.approx(float((y * y).mean()))
    torch.testing.assert_close(phi, (y[:, None] * v).mean(dim=0))
    rho, phi = sums.label_moments(centred=True)
    assert rho == pytest.approx(float(y.var(correction=0)))
    torch.testing.assert_close(phi, ((y - y.mean())[:, None] * (v - v.mean(dim=0))).mean(dim=0))


def test_label_moments_are_the_teachers_overlap_times_the_slope_of_the_sign():
    # Exact for Gaussian features: E[y v] = sqrt(2 / (pi rho)) phi.
    task = task_of("identity")
    sums = monte_carlo_of(task, "identity")
    theta = task.teacher_d / math.sqrt(task.latent)
    rho, expected = float(theta @ theta), random_feature_covariances(task, weights_of(), "identity")
    _, phi = sums.label_moments()
    scaled = math.sqrt(2 / (math.pi * rho)) * expected.phi_dK.T @ theta
    error = (expected.omega_KK.diagonal() / sums.count).sqrt()
    assert float(((phi - scaled) / error).abs().max()) < 4.5


def test_label_moments_of_unlabelled_samples_are_rejected():
    sums = MomentSums.zeros(latent=0, hidden=2)
    sums.add(torch.ones(3, 2), y_N=torch.ones(3))
    sums.add(torch.ones(2, 2))
    with pytest.raises(ValueError, match="got 3 of 5"):
        sums.label_moments()


# Analytic routes


def test_linear_features_have_closed_covariances_in_every_route():
    task, w = task_of("identity"), weights_of()
    f_w = task.features_dD @ w.T
    found = random_feature_covariances(task, w, "identity")
    torch.testing.assert_close(found.psi_dd, torch.eye(20).double())
    torch.testing.assert_close(found.phi_dK, f_w / math.sqrt(20 * 60))
    torch.testing.assert_close(found.omega_KK, f_w.T @ f_w / (20 * 60))


@pytest.mark.parametrize("name", MATRICES)
def test_linear_features_sampled_agree_with_the_closed_form(name):
    task = task_of("identity")
    sampled = getattr(monte_carlo_of(task, "identity").covariances(), name)
    exact = random_feature_covariances(task, weights_of(), "identity")
    left, right = {
        "psi_dd": (exact.psi_dd, exact.psi_dd),
        "phi_dK": (exact.psi_dd, exact.omega_KK),
        "omega_KK": (exact.omega_KK, exact.omega_KK),
    }[name]
    expected = getattr(exact, name)
    # The variance of a b for Gaussians is E a^2 E b^2 + (E a b)^2.
    error = (torch.outer(left.diagonal(), right.diagonal()) + expected.square()).sqrt() / 200
    assert float(((sampled - expected) / error).abs().max()) < 5


def test_erf_features_of_gaussian_inputs_agree_with_the_closed_form():
    task = task_of("identity")
    # Any W: a strong spike along the teacher, as after training.
    spike = torch.outer(torch.linspace(-2, 2, 30).double(), task.teacher_d @ task.features_dD) / 20
    w = weights_of() + spike
    sampled = monte_carlo_of(task, "erf", weights=w).covariances()
    exact = erf_covariances(task, w)
    # erf is at most 1, so a standard error is at most 1 / sqrt(40000).
    assert float((sampled.omega_KK - exact.omega_KK).abs().max()) < 4.5 / 200
    assert float((sampled.phi_dK - exact.phi_dK).abs().max()) < 4.5 / 200
    wrong = random_feature_covariances(task, w, "erf")
    assert float((sampled.omega_KK - wrong.omega_KK).abs().max()) > 0.1


@pytest.mark.parametrize("activation", ["tanh", "erf", "relu"])
def test_random_features_agree_with_route_b(activation):
    task, w = task_of(latent=100, inputs=400), weights_of(50, 400)
    sums = monte_carlo_of(task, activation, num=20_000, weights=w)
    sampled = sums.covariances(centred=True)
    exact = random_feature_covariances(task, w, activation)
    assert relative(sampled.omega_KK - exact.omega_KK, exact.omega_KK) < 0.1
    # 100 x 50 entries, each off by sqrt(omega_kk / n).
    noise = math.sqrt(100 * float(exact.omega_KK.trace()) / sums.count)
    assert float((sampled.phi_dK - exact.phi_dK).norm()) < 1.5 * noise
    assert relative(exact.phi_dK * 0.9 - exact.phi_dK, exact.phi_dK) > 0.05


def test_the_closed_routes_converge_for_large_sizes():
    gaps = []
    for latent in (10, 40, 160):
        task, w = task_of(latent=latent, inputs=4 * latent), weights_of(30, 4 * latent)
        b, c = random_feature_covariances(task, w, "erf"), erf_covariances(task, w)
        gaps.append(relative(b.omega_KK - c.omega_KK, c.omega_KK))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.04


def test_inputs_with_a_mean_are_rejected_by_the_closed_routes():
    for closed in (lambda t, w: random_feature_covariances(t, w, "tanh"), erf_covariances):
        with pytest.raises(ValueError, match="relu inputs: use monte_carlo"):
            closed(task_of("relu"), weights_of())
        with pytest.raises(ValueError, match=r"expected W \(K, 60\)"):
            closed(task_of(), weights_of(inputs=59))


# Bins


def test_bins_are_equally_likely_and_their_shares_sum_to_one():
    found = binned_of(task_of(), num=20_000)
    assert float(found.p_B.sum()) == pytest.approx(1)
    assert float((found.p_B - 1 / 8).abs().max()) < 4 * math.sqrt(7 / 64 / 20_000)


def binned_of(task, *, num, num_bins=8, activation="tanh"):
    return binned_moments(
        task,
        weights_of(),
        activation,
        num_samples=num,
        num_bins=num_bins,
        chunk=3000,
        seed=0,
        purpose="moments",
    )


@pytest.mark.parametrize("num_bins", [1, 3, 8])
def test_bins_add_up_to_the_moments_of_all_samples(num_bins):
    task = task_of()
    sums = monte_carlo_of(task, num=7000, chunk=3000)
    p, mu, cov = vars(binned_of(task, num=7000, num_bins=num_bins)).values()
    second = cov + mu[:, :, None] * mu[:, None, :]
    torch.testing.assert_close((p[:, None] * mu).sum(dim=0), sums.label_moments()[1])
    torch.testing.assert_close((p[:, None, None] * second).sum(dim=0), sums.covariances().omega_KK)


def test_bins_of_linear_features_have_closed_means():
    # Given |g| in a bin, g = theta . c / |theta|: E[y v] = E[|g|] times the overlap with theta.
    task = task_of("identity")
    found = binned_of(task, num=40_000, activation="identity")
    exact = random_feature_covariances(task, weights_of(), "identity")
    overlap = exact.phi_dK.T @ (task.teacher_d / task.teacher_d.norm())
    edges = torch.special.ndtri(0.5 + 0.5 * torch.arange(9).double() / 8)
    density = torch.exp(-0.5 * edges**2) / math.sqrt(2 * math.pi)
    mean_field = 2 * 8 * (density[:-1] - density[1:])
    error = (exact.omega_KK.diagonal() / 5000).sqrt()
    excess = (found.mu_BK - mean_field[:, None] * overlap) / error
    assert float(excess.abs().max()) < 4.5
    spread = exact.omega_KK - torch.outer(overlap, overlap)  # not explained by theta
    assert relative(found.cov_BKK[0] - spread, spread) < 0.1


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_merged_bins_are_bit_identical_to_the_stream_only_in_order(order):
    task = task_of()
    parts = chunks_of(task, [3000, 3000, 1000], make=chunk_bins)
    merged = type(parts[0]).merge([parts[i] for i in order]).moments()
    stream = binned_of(task, num=7000)
    assert torch.equal(merged.mu_BK, stream.mu_BK) == (order == [0, 1, 2])
    torch.testing.assert_close(merged.cov_BKK, stream.cov_BKK)


def test_bins_without_samples_and_features_that_are_not_odd_are_rejected():
    with pytest.raises(NumericsError, match="take more samples"):
        binned_of(task_of(), num=5)
    with pytest.raises(ValueError, match="num_bins >= 1"):
        binned_of(task_of(), num=50, num_bins=0)
    with pytest.raises(ValueError, match="tanh inputs and relu features"):
        binned_of(task_of(), num=50, activation="relu")
    with pytest.raises(ValueError, match="relu inputs and tanh features"):
        binned_of(task_of("relu"), num=50)


def test_a_bin_contains_the_samples_whose_field_lies_in_it():
    task = task_of()
    (part,) = chunks_of(task, [400], make=chunk_bins, num_bins=2)
    x, y, c = sample_chunk(task, 400, rng=torch_rng(0, "moments", 0))
    field = (c @ task.teacher_d).abs() / task.teacher_d.norm()
    far = field > 0.6744897501960817  # the median of |g|
    yv = y[:, None] * hidden_features(weights_of(), x, "tanh")
    assert part.count_B.tolist() == [int((~far).sum()), int(far.sum())]
    torch.testing.assert_close(part.sum_BK, torch.stack([yv[~far].sum(dim=0), yv[far].sum(dim=0)]))
