"""Contents and heights compared with closed forms, and the methods compared with each other."""

import math

import pytest
import torch

from dist_tl.errors import NotEuclideanError
from dist_tl.methods.geometry.simplex import (
    cayley_menger_log_content,
    log_content,
    squared_heights,
)


def sq_dist(points):
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square()


def points(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_edge_has_its_length_and_a_right_triangle_its_area():
    triangle = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]).double()[None]
    assert log_content(sq_dist(triangle)).exp().item() == pytest.approx(6.0)
    assert log_content(sq_dist(triangle[:, 1:])).exp().item() == pytest.approx(5.0)
    assert log_content(sq_dist(triangle[:, :1])).exp().item() == 1.0


@pytest.mark.parametrize("k", [1, 2, 5, 30, 120])
def test_the_regular_simplex_has_its_textbook_content(k):
    edge = 1.7
    distances = edge**2 * (1 - torch.eye(k + 1, dtype=torch.float64))[None]
    expected = k * math.log(edge) - math.lgamma(k + 1) + 0.5 * (math.log(k + 1) - k * math.log(2))
    for way in (log_content, cayley_menger_log_content):
        assert way(distances).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("k", [1, 2, 7, 30])
def test_determinant_gram_and_heights_agree(k):
    distances = sq_dist(points(4, k + 1, 40))
    by_gram = log_content(distances)
    by_heights = 0.5 * squared_heights(distances).log().sum(dim=1) - math.lgamma(k + 1)
    torch.testing.assert_close(cayley_menger_log_content(distances), by_gram, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(by_heights, by_gram, rtol=1e-9, atol=1e-9)


def test_a_height_is_the_residual_of_least_squares():
    p = points(1, 6, 9)
    edges = p[0, 1:5] - p[0, 0]
    tip = p[0, 5] - p[0, 0]
    solution = torch.linalg.lstsq(edges.T, tip[:, None]).solution
    residual = tip - (edges.T @ solution)[:, 0]
    assert squared_heights(sq_dist(p))[0, -1].item() == pytest.approx(float(residual @ residual))


def test_content_is_invariant_to_motions_and_vertex_order_and_scales():
    p = points(3, 5, 8)
    rotation = torch.linalg.qr(points(8, 8, seed=1)).Q
    content = log_content(sq_dist(p))
    torch.testing.assert_close(log_content(sq_dist(p @ rotation + 3)), content)
    torch.testing.assert_close(log_content(sq_dist(p[:, [3, 0, 4, 1, 2]])), content)
    torch.testing.assert_close(log_content(sq_dist(2.5 * p)), content + 4 * math.log(2.5))


def test_flat_simplices_have_zero_content_without_nan():
    line = torch.arange(4, dtype=torch.float64)[None, :, None]
    repeated = points(1, 4, 6)
    repeated[0, 3] = repeated[0, 1]
    for p in (line, repeated, points(1, 6, 3)):
        assert log_content(sq_dist(p)).item() == -math.inf
        assert squared_heights(sq_dist(p)).isfinite().all()


def test_content_is_largest_for_edges_at_right_angles():
    p = points(20, 5, 7)
    lengths = (p[:, 1:] - p[:, :1]).norm(dim=2).log().sum(dim=1)
    assert (log_content(sq_dist(p)) <= lengths - math.lgamma(5) + 1e-9).all()


def test_distances_that_no_points_have_are_rejected():
    broken = torch.tensor([[[0, 1, 100], [1, 0, 1], [100, 1, 0]]], dtype=torch.float64)
    for way in (log_content, cayley_menger_log_content, squared_heights):
        with pytest.raises(NotEuclideanError):
            way(broken)


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 2, 2)])
def test_other_shapes_and_types_are_rejected(bad):
    with pytest.raises(ValueError, match="expected"):
        log_content(bad)
