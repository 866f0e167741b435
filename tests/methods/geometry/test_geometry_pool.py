"""Class means over chunks, classes of a part of the pool, and pairs of the divergence forecast."""

import numpy as np
import pytest
import torch

from dist_tl.errors import ConfigError
from dist_tl.methods.geometry.classes import DROPPED, RareConfig
from dist_tl.methods.geometry.divergence import js_divergence
from dist_tl.methods.geometry.pairs import measured_pair
from dist_tl.methods.geometry.pool import (
    class_means,
    class_sums,
    class_table,
    kept_rows,
    part_classes,
)

TUPLES_Nm = torch.tensor([[0, 1], [0, 1], [2, 1], [0, 1], [2, 1], [1, 0]])
DROP = RareConfig(rare="drop", min_count=2)


def test_means_of_chunks_are_the_means_of_all_items():
    features_ND = torch.rand(30, 4)
    labels_N = torch.arange(30) % 3
    chunks = [class_sums(features_ND[i : i + 7], labels_N[i : i + 7], 3) for i in range(0, 30, 7)]
    expected = torch.stack([features_ND[labels_N == c].double().mean(dim=0) for c in range(3)])
    assert torch.allclose(class_means(chunks), expected, rtol=0, atol=1e-12)


def test_a_part_of_the_pool_has_classes_of_its_own():
    member_N = torch.tensor([True, True, False, True, False, True])
    classes_N = part_classes("part", TUPLES_Nm, member_N, DROP)
    assert classes_N.tolist() == [0, 0, DROPPED, 0, DROPPED, DROPPED]


def test_only_rare_classes_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"kmeans: every class .* rare.min_count = 9; lower it"):
        class_table("kmeans", TUPLES_Nm, RareConfig(rare="drop", min_count=9))


def test_kept_rows_are_all_items_that_are_not_dropped():
    classes_N = class_table("arm", TUPLES_Nm, DROP).lookup(TUPLES_Nm)
    rows = kept_rows(classes_N, np.random.default_rng(0))
    assert sorted(rows.tolist()) == [0, 1, 2, 3, 4]
    assert rows.tolist() == kept_rows(classes_N, np.random.default_rng(0)).tolist()


def test_a_pair_has_divergences_in_both_directions():
    source_ND, target_KD = torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    pair = measured_pair("a", "b", source_ND, target_KD, 0.25)
    p, q = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.25, 0.75]).double()
    assert pair.js == pytest.approx(js_divergence(p, q), abs=1e-5)
    assert pair.kl_target_source == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3), abs=1e-5)
    assert pair.kl_source_target == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5), abs=1e-5)
    assert pair.error == 0.25
