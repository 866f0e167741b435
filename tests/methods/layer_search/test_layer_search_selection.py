"""Properties of the layer search."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from dist_tl.errors import ConfigError
from dist_tl.methods.layer_search.classifiers import (
    ClassifierConfig,
    loo_scores,
    query_item_scores,
    query_scores,
)
from dist_tl.methods.layer_search.evaluate import (
    accuracies,
    one_shot_set,
    score_episode,
    select_by_views,
)
from dist_tl.methods.layer_search.gram import layer_grams, one_hot, set_grams
from dist_tl.methods.layer_search.search import (
    SearchConfig,
    check_search,
    count_sets,
    null_z,
    search_layers,
    select_layers,
)

CONFIG = SearchConfig(permutations=0)
WAYS, QUERIES = 5, 15


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def planted_episode(seed, shots, informative, num_layers=6, width=24, strength=2.0):
    """Returns noise layers and planted layers with separated class means; support first."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(WAYS).repeat_interleave(shots)
    queries = torch.arange(WAYS).repeat_interleave(QUERIES)
    everyone = torch.cat([labels, queries])
    phis = []
    for layer in range(num_layers):
        noise = torch.randn(len(everyone), width, generator=rng)
        if layer in informative:
            means = torch.randn(WAYS, width, generator=rng)
            noise = noise + strength * means[everyone]
        phis.append(unit(noise))
    grams = layer_grams(phis, torch.arange(len(everyone)))
    return grams, labels, queries


def select(grams, labels, config=CONFIG, **options):
    size = len(labels)
    return select_layers(
        grams[:, :size, :size], labels, config, rng=np.random.default_rng(0), **options
    )


@pytest.mark.parametrize("shots", [2, 5])
def test_the_planted_layer_is_chosen(shots):
    chosen = [select(*planted_episode(seed, shots, {2})[:2]).layers for seed in range(60)]
    assert sum(2 in layers for layers in chosen) >= 57


def test_the_penultimate_layer_is_chosen_if_only_it_is_informative():
    for seed in range(20):
        grams, labels, queries = planted_episode(seed, 5, {5})
        selection = select(grams, labels, SearchConfig(permutations=0, strategy="single"))
        assert selection.layers == (5,)
        found = accuracies(grams, labels, queries, [(5,), selection.layers], CONFIG.classifier)
        assert found[0] == found[1]


def test_without_information_accuracy_is_chance():
    scores = []
    for seed in range(60):
        grams, labels, queries = planted_episode(seed, 2, set())
        selection = select(grams, labels)
        scores.append(accuracies(grams, labels, queries, [selection.layers], CONFIG.classifier)[0])
    error = np.std(scores, ddof=1) / math.sqrt(len(scores))
    assert abs(np.mean(scores) - 1 / WAYS) < 3 * error


def test_among_identical_layers_the_penultimate_one_is_chosen():
    grams, labels, _ = planted_episode(0, 3, {0})
    same = grams[:1].expand(4, -1, -1)
    assert select(same, labels).layers == (3,)


def test_the_search_does_not_use_queries():
    grams, labels, _ = planted_episode(1, 3, {1, 4})
    poisoned = grams.clone()
    poisoned[:, len(labels) :, :] = math.nan
    poisoned[:, :, len(labels) :] = math.nan
    assert select(poisoned, labels) == select(grams, labels)


@pytest.mark.parametrize("kind", ["ridge", "ncm"])
def test_order_and_class_names_of_the_support_do_not_matter(kind):
    config = SearchConfig(permutations=0, classifier=ClassifierConfig(kind=kind))
    grams, labels, _ = planted_episode(2, 3, {1, 3})
    size = len(labels)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    renamed = (labels[order] + 2) % WAYS
    support = grams[:, :size, :size]
    one = select_layers(support, labels, config, rng=np.random.default_rng(0))
    two = select_layers(
        support[:, order][:, :, order], renamed, config, rng=np.random.default_rng(0)
    )
    assert one.layers == two.layers
    assert two.single_scores == pytest.approx(one.single_scores, rel=1e-10)


def test_greedy_scores_rise_and_sets_stay_within_the_cap():
    for seed in range(10):
        grams, labels, _ = planted_episode(seed, 4, {0, 2, 3, 5}, strength=0.7)
        for cap in (1, 2, 4):
            selection = select(grams, labels, SearchConfig(permutations=0, cap=cap))
            assert list(selection.path) == sorted(selection.path)
            assert 1 <= len(selection.best) <= cap


def test_wider_searches_never_score_lower():
    for seed in range(6):
        grams, labels, _ = planted_episode(seed, 3, {0, 2, 4}, strength=0.7)
        scores = [
            select(grams, labels, SearchConfig(permutations=0, epsilon=0, strategy=name)).score
            for name in ("single", "greedy", "beam", "exhaustive")
        ]
        assert all(after >= before - 1e-9 for before, after in pairwise(scores))


def test_the_guard_keeps_the_penultimate_layer_unless_the_gain_is_clear():
    grams, labels, _ = planted_episode(3, 3, {1})
    assert select(grams, labels).adopted
    kept = select(grams, labels, SearchConfig(permutations=0, margin=10.0))
    assert kept.layers == (5,)
    assert not kept.adopted
    assert kept.best != (5,)


def test_one_label_per_class_uses_the_configured_method():
    grams, labels, _ = planted_episode(4, 1, {1})
    assert select(grams, labels).branch == "penultimate"
    assert select(grams, labels).layers == (5,)
    fixed = select(grams, labels, fixed=(1, 2))
    assert (fixed.branch, fixed.layers) == ("held_out_classes", (1, 2))
    forced = SearchConfig(permutations=0, one_shot="penultimate")
    assert select(grams, labels, forced, fixed=(1,)).branch == "penultimate"


def test_held_out_classes_find_the_planted_layer_for_one_label_per_class():
    episodes = [planted_episode(seed, 1, {3}) for seed in range(30)]
    assert one_shot_set(episodes, CONFIG) == (3,)


def test_single_items_of_a_class_are_skipped_and_counted():
    grams, labels, _ = planted_episode(5, 3, {2})
    kept = torch.tensor([i for i in range(len(labels)) if i not in (1, 2)])
    selection = select_layers(
        grams[:, kept][:, :, kept], labels[kept], CONFIG, rng=np.random.default_rng(0)
    )
    assert selection.skipped == 1
    assert math.isfinite(selection.score)


def test_a_single_layer_needs_no_search():
    grams, labels, _ = planted_episode(6, 2, {0}, num_layers=1)
    assert select(grams, labels).layers == (0,)


def test_a_class_without_support_is_rejected():
    grams, labels, _ = planted_episode(7, 2, {0})
    size = len(labels)
    with pytest.raises(ValueError, match="at least one support item each"):
        select_layers(
            grams[:, :size, :size], labels.clamp_min(1), CONFIG, rng=np.random.default_rng(0)
        )


@pytest.mark.parametrize(
    ("layers", "cap", "sets"), [(17, 17, 131_071), (16, 16, 65_535), (17, 4, 3_213)]
)
def test_the_size_of_an_exhaustive_search_is_checked_before_it_starts(layers, cap, sets):
    config = SearchConfig(strategy="exhaustive", cap=cap)
    assert count_sets(layers, config) == sets
    if sets > 2**16:
        with pytest.raises(ConfigError, match=r"131,071 sets.*greedy"):
            check_search(layers, config)
    else:
        check_search(layers, config)


@pytest.mark.parametrize("kind", ["ridge", "ncm", "logistic"])
def test_leave_one_out_equals_refitting(kind):
    config = ClassifierConfig(kind=kind)
    grams, labels, _ = planted_episode(8, 3, {0, 1}, num_layers=3, width=6)
    size = len(labels)
    gram = grams[:, :size, :size]
    y = one_hot(labels, WAYS)
    scores = loo_scores(gram, y, config)
    for item in range(size):
        rest = [i for i in range(size) if i != item]
        again = query_item_scores(
            gram[:, rest][:, :, rest], gram[:, [item]][:, :, rest], y[rest], y[[item]], config
        )
        if kind == "ncm":  # query scores are distances up to the norm of the query
            assert again.shape == (3, 1)
        tolerance = 1e-4 if kind == "logistic" else 1e-9
        torch.testing.assert_close(scores[:, item], again[:, 0], rtol=tolerance, atol=tolerance)


def test_ridge_in_kernel_form_is_ridge_on_the_vectors():
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(30, 7, generator=rng, dtype=torch.float64)
    y = one_hot(torch.arange(20) % WAYS, WAYS)
    train, test = x[:20], x[20:]
    centred = train - train.mean(dim=0)
    weights = torch.linalg.solve(
        centred.T @ centred + 0.1 * torch.eye(7, dtype=torch.float64), centred.T @ y
    )
    expected = y.mean(dim=0) + (test - train.mean(dim=0)) @ weights
    found = query_scores((train @ train.T)[None], (test @ train.T)[None], y, ClassifierConfig())
    torch.testing.assert_close(found[0], expected, rtol=1e-8, atol=1e-10)


def test_the_gram_matrix_of_a_set_is_that_of_its_joined_vectors():
    phis = [
        unit(torch.randn(8, width, generator=torch.Generator().manual_seed(width)))
        for width in (3, 9, 5)
    ]
    grams = layer_grams(phis, torch.arange(8))
    joined = torch.cat([phis[0], phis[2]], dim=1).double() / math.sqrt(2)
    torch.testing.assert_close(set_grams(grams, [(0, 2)])[0], joined @ joined.T)


def test_noise_layers_of_different_widths_have_the_highest_z_equally_often():
    firsts = []
    for seed in range(200):
        rng = torch.Generator().manual_seed(seed)
        labels = torch.arange(WAYS).repeat_interleave(3)
        phis = [unit(torch.randn(15, width, generator=rng)) for width in (16, 32)]
        grams = layer_grams(phis, torch.arange(15))
        config = SearchConfig(permutations=40)
        z = null_z(grams, one_hot(labels, WAYS), config, np.random.default_rng(seed))
        firsts.append(int(np.argmax(z)))
    count = sum(firsts)
    assert (count - 100) ** 2 / 100 * 2 < 6.63  # chi-square, one degree of freedom, 1 %


def test_a_planted_layer_has_a_high_z():
    grams, labels, _ = planted_episode(10, 4, {2})
    z = select(grams, labels, SearchConfig(permutations=50)).single_z
    assert z[2] == max(z)
    assert z[2] > 5


def test_the_first_layer_can_be_ranked_by_z():
    grams, labels, _ = planted_episode(11, 4, {2})
    config = SearchConfig(permutations=50, rank_by="null_z", strategy="single")
    assert select(grams, labels, config).best == (2,)


def test_the_oracle_is_at_least_as_good_as_any_arm():
    grams, labels, queries = planted_episode(12, 3, {1, 2})
    selection = select(grams, labels)
    found = score_episode(grams, labels, queries, selection, CONFIG, rng=np.random.default_rng(0))
    assert found.oracle >= max(*found.single, found.selected, found.all_layers, found.random)
    again = score_episode(grams, labels, queries, selection, CONFIG, rng=np.random.default_rng(0))
    assert again == found


def test_scores_of_any_kind_can_be_searched():
    table = {(0,): [0.0, 0.1], (1,): [1.0, 1.1], (2,): [0.5, 0.2]}
    found = search_layers(
        lambda sets: torch.tensor([table.get(s, [-9.0, -9.0]) for s in sets]).double(), 3, CONFIG
    )
    assert found.best == (1,)
    assert found.path == (pytest.approx(1.05),)


def test_views_find_the_planted_layer_for_one_label_per_class():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(WAYS)
    phis = []
    for layer in range(5):
        image = torch.randn(WAYS, 20, generator=rng)
        views = [
            image + torch.randn(WAYS, 20, generator=rng) * (0.3 if layer == 1 else 30)
            for _ in range(4)
        ]
        phis.append(unit(torch.cat(views)))
    grams = layer_grams(phis, torch.arange(4 * WAYS))
    found = select_by_views(grams, labels, 4, SearchConfig(strategy="single"))
    assert (found.layers, found.branch) == ((1,), "augmented_views")
    with pytest.raises(ValueError, match="views"):
        select_by_views(grams, labels, 3, SearchConfig())
