"""Classes of labels, control labels, and the divergence forecast."""

import math

import numpy as np
import pytest
import torch

from dist_tl.errors import ConfigError
from dist_tl.methods.geometry.classes import (
    DROPPED,
    ClassTable,
    RareConfig,
    histogram,
    merge_counts,
)
from dist_tl.methods.geometry.controls import kmeans_labels, shuffled_labels
from dist_tl.methods.geometry.divergence import (
    activation_distribution,
    js_divergence,
    kl_divergence,
    rank_forecast,
)

KEEP = RareConfig(rare="keep")


def labels(*rows):
    return torch.tensor([list(label) for label, count in rows for _ in range(count)])


def test_classes_are_numbered_in_lexicographic_order():
    found = labels(((2, 0), 1), ((0, 1), 2), ((0, 2), 1))
    table = ClassTable.of(histogram(found), KEEP)
    assert table.names == ((0, 1), (0, 2), (2, 0))
    assert table.lookup(found).tolist() == [2, 0, 0, 1]
    assert table.sizes == (2, 1, 1)


def test_histograms_of_chunks_add_up():
    found = torch.randint(0, 3, (50, 2), generator=torch.Generator().manual_seed(0))
    parts = merge_counts(histogram(chunk) for chunk in found.split(7))
    assert parts == histogram(found)


def test_rare_classes_are_merged_into_their_prefix_repeatedly():
    found = labels(((0, 1, 2), 30), ((0, 1, 3), 4), ((0, 1, 4), 17), ((0, 2, 1), 3), ((5, 1, 2), 2))
    table = ClassTable.of(histogram(found), RareConfig(min_count=20))
    # (0, 1, *) has 21 merged items; (0, *) and (5, *) stay too small and are dropped.
    assert table.names == ((0, 1), (0, 1, 2))
    assert table.sizes == (21, 30)
    assert table.dropped == 5
    assert table.merged == 21
    assert (table.lookup(found) == DROPPED).sum() == 5


def test_a_class_of_exactly_min_count_is_not_rare():
    found = labels(((0, 1), 20), ((1, 0), 19))
    table = ClassTable.of(histogram(found), RareConfig(rare="drop", min_count=20))
    assert (table.names, table.dropped) == (((0, 1),), 19)


@pytest.mark.parametrize("min_count", [1, 5, 20, 60])
@pytest.mark.parametrize("rare", ["merge_to_prefix", "drop", "keep"])
def test_every_item_is_in_a_class_or_counted_as_dropped(rare, min_count):
    rng = torch.Generator().manual_seed(2)
    found = (torch.rand(600, 3, generator=rng) ** 2 * 5).long()
    table = ClassTable.of(histogram(found), RareConfig(rare=rare, min_count=min_count))
    classes = table.lookup(found)
    assert sum(table.sizes) + table.dropped == 600
    assert (classes == DROPPED).sum() == table.dropped
    kept = classes[classes != DROPPED]
    assert torch.bincount(kept, minlength=len(table.sizes)).tolist() == list(table.sizes)
    if rare != "keep":
        assert all(size >= min_count for size in table.sizes)


def test_entropy_and_largest_share_describe_the_histogram():
    even = ClassTable.of({(i,): 10 for i in range(4)}, KEEP)
    assert even.entropy == pytest.approx(math.log(4))
    assert even.largest_share == 0.25
    one = ClassTable.of({(0,): 7}, KEEP)
    assert (one.entropy, one.largest_share) == (0.0, 1.0)


def test_no_labels_are_rejected():
    with pytest.raises(ValueError, match="at least one"):
        ClassTable.of({}, KEEP)


def test_shuffled_labels_have_the_same_histogram_and_no_information():
    classes = torch.arange(5).repeat_interleave(200)
    found = shuffled_labels(classes, np.random.default_rng(0))
    assert torch.equal(found.bincount(), classes.bincount())
    assert abs(float((found == classes).double().mean()) - 0.2) < 0.05


def test_k_means_finds_clusters_and_depends_on_its_seed():
    rng = torch.Generator().manual_seed(0)
    centre = torch.randn(4, 6, generator=rng) * 20
    x = centre.repeat_interleave(30, dim=0) + torch.randn(120, 6, generator=rng)
    found = kmeans_labels(x, 4, seed=3)
    assert torch.equal(found, kmeans_labels(x, 4, seed=3))
    groups = [set(found[i * 30 : (i + 1) * 30].tolist()) for i in range(4)]
    assert all(len(group) == 1 for group in groups)
    assert len(set.union(*groups)) == 4
    with pytest.raises(ConfigError, match="clusters"):
        kmeans_labels(x, 121, seed=0)


def distribution(seed, shift=0.0):
    rng = torch.Generator().manual_seed(seed)
    return activation_distribution(torch.rand(200, 10, generator=rng) + shift * torch.arange(10))


def test_divergences_are_zero_for_equal_data_and_positive_otherwise():
    p, q = distribution(0), distribution(0, 0.3)
    assert kl_divergence(p, p) == js_divergence(p, p) == 0
    assert kl_divergence(p, q) > 0
    assert kl_divergence(p, q) != pytest.approx(kl_divergence(q, p), rel=1e-3)
    assert js_divergence(p, q) == pytest.approx(js_divergence(q, p))
    assert js_divergence(p, q) <= math.log(2)


def test_divergences_are_finite_if_a_feature_is_always_zero():
    dead = torch.rand(20, 4)
    dead[:, 1] = 0
    p, q = activation_distribution(dead), activation_distribution(torch.rand(20, 4))
    assert math.isfinite(kl_divergence(q, p))
    opposite = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    assert js_divergence(*opposite) == pytest.approx(math.log(2))


@pytest.mark.parametrize("bad", [torch.tensor([[-1.0, 1.0]]), torch.zeros(3, 2)])
def test_activations_below_zero_or_all_zero_are_rejected(bad):
    with pytest.raises(ValueError, match="expected"):
        activation_distribution(bad)


def test_the_divergence_forecasts_a_controlled_shift():
    base = distribution(0)
    shifts = np.linspace(0, 1, 12)
    divergences = [js_divergence(base, distribution(7, s)) for s in shifts]
    rng = np.random.default_rng(0)
    errors = 0.1 + 0.3 * shifts + 0.02 * rng.standard_normal(12)
    targets = [f"target {i % 4}" for i in range(12)]
    found = rank_forecast(divergences, errors, targets, rng=rng)
    assert found.rho > 0.9
    assert found.low > 0.5
    assert found.left_out_error < 0.15


def test_few_pairs_have_no_interval_and_fewer_are_rejected():
    few = rank_forecast([0, 1, 2], [0, 2, 1], ["a", "b", "c"], rng=np.random.default_rng(0))
    assert (few.low, few.high, few.pairs) == (None, None, 3)
    with pytest.raises(ValueError, match="three pairs"):
        rank_forecast([0, 1], [0, 1], ["a", "b"], rng=np.random.default_rng(0))
