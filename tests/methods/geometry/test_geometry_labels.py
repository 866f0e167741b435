"""Labels by heights compared with labels by determinants, and their invariances."""

import itertools
import math

import pytest
import torch

from dist_tl.errors import ConfigError, NumericsError
from dist_tl.methods.geometry.controls import nearest_anchors
from dist_tl.methods.geometry.item_labels import Anchors, LabelConfig, label_items
from dist_tl.methods.geometry.simplex import cayley_menger_log_content

SETTINGS = list(itertools.product(("nearest", "farthest"), ("max", "min")))
N, M, D = 60, 8, 12


def points(count, seed=0, width=D):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=rng, dtype=torch.float64)


ITEMS, ANCHORS = points(N, 1), points(M, 2)


def tuples(items=ITEMS, anchors=ANCHORS, **config):
    return label_items(items, Anchors.of(anchors), LabelConfig(**config)).tuples_Nm


def content(vertices):
    p = torch.stack(vertices)
    d = torch.cdist(p, p, compute_mode="donot_use_mm_for_euclid_dist").square()
    return float(cayley_menger_log_content(d[None]))


def by_determinants(item, start, grow, m):
    chosen = []
    for step in range(m):
        wants_max = (start == "farthest") if step == 0 else (grow == "max")
        rest = [a for a in range(M) if a not in chosen]
        score = {a: content([item, *ANCHORS[chosen], ANCHORS[a]]) for a in rest}
        chosen.append((max if wants_max else min)(rest, key=score.get))
    return chosen


@pytest.mark.parametrize(("start", "grow"), SETTINGS)
@pytest.mark.parametrize("factor", ["cholesky", "qr"])
def test_labels_by_heights_equal_labels_by_determinants(start, grow, factor):
    found = tuples(start=start, grow=grow, factor=factor, m=4)
    for item, label in zip(ITEMS[:25], found[:25].tolist(), strict=True):
        assert label == by_determinants(item, start, grow, 4)


@pytest.mark.parametrize(("start", "grow"), SETTINGS)
def test_anchors_of_a_label_are_distinct_and_shorter_labels_are_prefixes(start, grow):
    longest = tuples(start=start, grow=grow, m=M)
    assert (longest.sort(dim=1).values == torch.arange(M)).all()
    for m in (1, 3, 5):
        assert torch.equal(tuples(start=start, grow=grow, m=m), longest[:, :m])


@pytest.mark.parametrize(("start", "grow"), SETTINGS)
def test_labels_are_invariant_to_motion_scale_and_a_large_offset(start, grow):
    rotation = torch.linalg.qr(points(D, 3)).Q
    plain = tuples(start=start, grow=grow)
    for moved in (
        lambda x: x @ rotation,
        lambda x: 1e3 * x,
        lambda x: x + 1e6,
        lambda x: (x @ rotation) * 0.01 - 5,
    ):
        assert torch.equal(tuples(moved(ITEMS), moved(ANCHORS), start=start, grow=grow), plain)


def test_renaming_anchors_renames_labels():
    order = torch.randperm(M, generator=torch.Generator().manual_seed(0))
    renamed = tuples(anchors=ANCHORS[order])
    assert torch.equal(order[renamed], tuples())


def test_heights_of_max_never_increase():
    found = label_items(ITEMS, Anchors.of(ANCHORS), LabelConfig(m=M, start="farthest"))
    assert (found.heights_Nm.diff(dim=1) <= 1e-9).all()
    near = label_items(ITEMS, Anchors.of(ANCHORS), LabelConfig(m=M)).heights_Nm[:, 1:]
    assert (near.diff(dim=1) <= 1e-9).all()


def test_one_anchor_is_the_nearest_or_the_farthest():
    distance = torch.cdist(ITEMS, ANCHORS)
    assert torch.equal(tuples(m=1)[:, 0], distance.argmin(dim=1))
    assert torch.equal(tuples(m=1, start="farthest")[:, 0], distance.argmax(dim=1))
    nearest = nearest_anchors(ITEMS, Anchors.of(ANCHORS), 3)
    assert torch.equal(nearest, distance.argsort(dim=1)[:, :3])


def test_an_anchor_that_is_never_selected_changes_nothing():
    # At the centre of the others it is never the farthest and adds little content.
    middle = torch.cat([ANCHORS, ANCHORS.mean(dim=0, keepdim=True) + 1e-3])
    found = tuples(anchors=middle, start="farthest", m=2)
    assert torch.equal(found, tuples(start="farthest", m=2))


@pytest.mark.parametrize("size", [1, 7, N])
def test_chunks_and_order_of_items_do_not_matter(size):
    joint = tuples()
    parts = torch.cat([tuples(chunk) for chunk in ITEMS.split(size)])
    assert torch.equal(parts, joint)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    assert torch.equal(tuples(ITEMS[order]), joint[order])


def test_float32_features_give_the_same_labels_where_the_margin_is_clear():
    found = label_items(ITEMS, Anchors.of(ANCHORS), LabelConfig())
    rounded = tuples(ITEMS.float(), ANCHORS.float())
    clear = found.margin_N > 1e-5
    assert clear.sum() > N / 2
    assert torch.equal(rounded[clear], found.tuples_Nm[clear])


def test_an_item_at_an_anchor_starts_with_it():
    found = label_items(ANCHORS[3:4], Anchors.of(ANCHORS), LabelConfig(m=3))
    assert found.tuples_Nm[0, 0] == 3
    assert found.heights_Nm[0, 0] == pytest.approx(0.0, abs=1e-6)


def test_small_heights_are_exact_by_qr():
    base = points(5, 4, width=32)
    item = base[0]
    flat = base[1:4]
    for eps in (1e-3, 1e-5):
        direction = points(1, 5, width=32)[0]
        edges = flat - item
        direction = (
            direction - edges.T @ torch.linalg.lstsq(edges.T, direction[:, None]).solution[:, 0]
        )
        tip = item + edges.sum(dim=0) / 3 + eps * direction / direction.norm()
        anchors = Anchors.of(torch.cat([flat, tip[None]]))
        config = LabelConfig(m=4, factor="qr", start="farthest")
        found = label_items(item[None], anchors, config)
        assert 3 in found.tuples_Nm[0]
        assert found.heights_Nm[0].min().item() < 10 * eps
        assert found.heights_Nm.isfinite().all()


def test_dependent_anchors_are_counted_and_never_nan():
    plane = torch.cat([points(4, 6, width=2), torch.zeros(4, 3).double()], dim=1)
    items = torch.cat([points(5, 7, width=2), torch.zeros(5, 3).double()], dim=1)
    for grow in ("max", "min"):
        for factor in ("cholesky", "qr"):
            config = LabelConfig(m=4, grow=grow, factor=factor)
            found = label_items(items, Anchors.of(plane), config)
            assert found.degenerate_N.all()
            assert (found.tuples_Nm.sort(dim=1).values == torch.arange(4)).all()
            assert found.heights_Nm.isfinite().all()


def test_an_empty_chunk_has_no_labels():
    assert tuples(ITEMS[:0]).shape == (0, 3)


def test_labels_longer_than_the_anchors_are_rejected():
    with pytest.raises(ConfigError, match=r"m = 9 exceeds the number of anchors, 8"):
        tuples(m=9)


def test_features_that_are_not_finite_are_named():
    broken = ITEMS.clone()
    broken[17, 2] = math.nan
    with pytest.raises(NumericsError, match="item 17"):
        tuples(broken)
    with pytest.raises(NumericsError, match="anchor"):
        Anchors.of(torch.full((2, 2), math.inf))


def test_equal_anchors_are_rejected():
    twice = torch.cat([ANCHORS, ANCHORS[2:3]])
    with pytest.raises(ConfigError, match="anchors 2 and 8"):
        Anchors.of(twice)
