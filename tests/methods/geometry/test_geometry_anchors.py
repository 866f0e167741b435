"""Mode B compared with pivoted QR and brute force, for any division into chunks."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from dist_tl.errors import ConfigError, NumericsError
from dist_tl.methods.geometry.anchors import AnchorChunk, choose_anchors
from dist_tl.methods.geometry.simplex import log_content


def points(count, width, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=rng, dtype=torch.float64)


def chunks(p, size):
    return [
        AnchorChunk(part, first)
        for first, part in zip(range(0, len(p), size), p.split(size), strict=True)
    ]


@pytest.mark.parametrize("size", [1, 7, 40, 100])
def test_chunks_select_the_anchors_of_pivoted_qr(size):
    p = points(100, 12)
    found = choose_anchors(chunks(p, size), 9)
    vertex = int((p - p.mean(dim=0)).norm(dim=1).argmax())
    rest = [i for i in range(100) if i != vertex]
    _, _, pivots = scipy.linalg.qr((p[rest] - p[vertex]).T.numpy(), pivoting=True, mode="economic")
    assert found == [vertex, *(rest[i] for i in pivots[:8])]


def test_greedy_content_is_no_larger_than_the_best():
    p = points(12, 5, seed=3)
    found = choose_anchors(chunks(p, 5), 4)

    def content(rows):
        chosen = p[list(rows)]
        return float(log_content(torch.cdist(chosen, chosen).square()[None]))

    best = max(content(rows) for rows in itertools.combinations(range(12), 4))
    assert content(found) <= best + 1e-12
    assert content(found) > best - 2


def test_equal_points_are_taken_by_lowest_index():
    p = points(6, 4, seed=1).repeat(2, 1)
    assert max(choose_anchors(chunks(p, 5), 4)) < 6


def test_at_most_all_vertices_of_a_simplex_can_be_selected():
    p = points(30, 3)
    assert len(set(choose_anchors(chunks(p, 10), 4))) == 4
    with pytest.raises(ConfigError, match=r"at most 4, got 5.*flat of 4"):
        choose_anchors(chunks(p, 10), 5)


@pytest.mark.parametrize("m", [0, 31])
def test_more_anchors_than_points_or_none_are_rejected(m):
    with pytest.raises(ConfigError, match="1 to 30"):
        choose_anchors(chunks(points(30, 40), 10), m)


def test_points_that_are_not_finite_are_named():
    p = points(10, 3)
    p[4, 1] = math.inf
    with pytest.raises(NumericsError, match="item 14"):
        AnchorChunk(p, 10)


def test_an_empty_chunk_proposes_nothing():
    p = points(8, 3)
    joint = choose_anchors([AnchorChunk(p, 0)], 3)
    assert choose_anchors([AnchorChunk(p, 0), AnchorChunk(p[:0], 8)], 3) == joint


def test_anchors_agree_with_numpy():
    p = points(50, 20, seed=9)
    found = choose_anchors(chunks(p, 13), 6)
    edges = (p[found[1:]] - p[found[0]]).numpy()
    heights = np.abs(np.diag(np.linalg.qr(edges.T)[1]))
    assert (np.diff(heights) <= 1e-9).all()
