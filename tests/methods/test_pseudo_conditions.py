"""Conditions: exact limits of every kind, distributions of draws, and reproducible draws."""

import inspect
import math

import pytest
import torch
from scipy import stats
from torch import nn

from dist_tl.config import validate
from dist_tl.errors import ConfigError, NumericsError
from dist_tl.methods.pseudo.conditions import (
    ConditionConfig,
    condition_entropy,
    draw_classes,
    draw_conditions,
    one_hot,
    require_finite,
    source_probabilities,
)
from dist_tl.seeds import numpy_rng

KINDS = ["soft", "top_k", "hard", "marginal", "uniform"]


def classifier(num_classes, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, num_classes)
    )


def some_images(num, seed=1):
    return torch.rand(num, 1, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def some_q(num_rows=6, num_classes=5, seed=2):
    rng = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(num_rows, num_classes, generator=rng)).softmax(dim=1)


def draw(kind, q, samples, **options):
    config = ConditionConfig(kind=kind, **{"k": 2, **options})
    return draw_conditions(q, config, run_seed=3, purpose="test", sample_indices=samples)


def chi_square_p(counts, expected):
    return stats.chisquare(counts, expected).pvalue


# Probabilities of the source classifier


@pytest.mark.parametrize("temperature", [1e-30, 0.3, 1.0, 7.0, 1e30])
def test_probabilities_lie_on_the_simplex_at_every_temperature(temperature):
    q = source_probabilities(classifier(7), some_images(9), temperature=temperature)
    assert q.shape == (9, 7)
    assert q.dtype == torch.float32
    assert (q >= 0).all()
    torch.testing.assert_close(q.sum(dim=1), torch.ones(9), atol=1e-6, rtol=0)


def test_an_infinite_temperature_gives_the_constant_vector():
    q = source_probabilities(classifier(4), some_images(3), temperature=1e30)
    torch.testing.assert_close(q, torch.full((3, 4), 0.25), atol=1e-7, rtol=0)


def test_a_vanishing_temperature_gives_the_hard_condition():
    q = source_probabilities(classifier(4), some_images(20))
    cold = source_probabilities(classifier(4), some_images(20), temperature=1e-6)
    assert torch.equal(cold, one_hot(q.argmax(dim=1), 4))


def test_probabilities_do_not_depend_on_the_batch():
    network, images = classifier(5), some_images(11)
    together = source_probabilities(network, images, batch_size=11)
    torch.testing.assert_close(source_probabilities(network, images, batch_size=2), together)


def test_the_source_classifier_does_not_change():
    network = classifier(5).train()
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    q = source_probabilities(network, some_images(8))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert [part.training for part in network.modules()] == [True, True, False, True, True, True]
    assert not q.requires_grad
    assert all(weight.grad is None for weight in network.parameters())


def test_a_classifier_in_training_mode_is_evaluated_in_eval_mode():
    network, images = classifier(5), some_images(8)
    network(images * 3)  # makes the running statistics differ from those of the batch
    in_training = source_probabilities(network.train(), images)
    assert torch.equal(in_training, source_probabilities(network.eval(), images))


def test_a_temperature_of_zero_is_rejected():
    with pytest.raises(ConfigError, match="temperature above 0"):
        source_probabilities(classifier(3), some_images(2), temperature=0.0)
    with pytest.raises(ConfigError, match="temperature"):
        validate(ConditionConfig, {"temperature": 0.0}, source="job")


def test_a_source_of_one_class_is_rejected():
    with pytest.raises(ConfigError, match=">= 2 source classes"):
        source_probabilities(classifier(1), some_images(2))


def test_logits_that_are_not_finite_name_the_image():
    images = some_images(5)
    images[3] = math.nan
    with pytest.raises(NumericsError, match="target image 3"):
        source_probabilities(classifier(3), images, batch_size=2)


def test_a_sample_that_is_not_finite_is_named_by_its_number():
    values = torch.zeros(3, 2, 2)
    require_finite(values, name="pseudo image")
    values[1, 0, 1] = math.inf
    with pytest.raises(NumericsError, match="pseudo image 41 "):
        require_finite(values, name="pseudo image", sample_indices=[40, 41, 42])


# Kinds


def test_a_soft_condition_is_its_row():
    q = some_q()
    condition, row = draw("soft", q, range(50))
    assert torch.equal(condition, q[row])
    assert set(row.tolist()) == set(range(6))


def test_top_k_keeps_the_k_largest_and_renormalises():
    q = torch.tensor([[0.4, 0.1, 0.3, 0.2]])
    expected = torch.tensor([[4 / 7, 0.0, 3 / 7, 0.0]])
    torch.testing.assert_close(draw("top_k", q, [0], k=2).condition_SK, expected)


def test_top_k_breaks_ties_to_the_lowest_index():
    q = torch.full((1, 40), 1 / 40)
    kept = draw("top_k", q, [0], k=3).condition_SK[0].nonzero().flatten()
    assert kept.tolist() == [0, 1, 2]


def test_top_k_with_all_classes_is_soft_and_with_one_is_hard():
    q = some_q()
    soft, hard = draw("soft", q, range(20)), draw("hard", q, range(20))
    torch.testing.assert_close(draw("top_k", q, range(20), k=5).condition_SK, soft.condition_SK)
    assert torch.equal(draw("top_k", q, range(20), k=1).condition_SK, hard.condition_SK)


def test_top_k_of_more_classes_than_exist_is_rejected():
    with pytest.raises(ConfigError, match="k <= 5"):
        draw("top_k", some_q(), [0], k=6)


def test_hard_is_the_most_likely_class_with_ties_to_the_lowest_index():
    q = torch.tensor([[0.2, 0.4, 0.4]])
    assert draw("hard", q, [0]).condition_SK.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_condition_lies_on_the_simplex(kind):
    condition = draw(kind, some_q(), range(200)).condition_SK
    assert condition.shape == (200, 5)
    assert condition.dtype == torch.float32
    assert (condition >= 0).all()
    torch.testing.assert_close(condition.sum(dim=1), torch.ones(200), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["marginal", "uniform"])
def test_controls_have_no_target_image(kind):
    condition, row = draw(kind, some_q(), range(30))
    assert (row == -1).all()
    assert (condition.amax(dim=1) == 1).all()


def test_q_of_a_single_class_or_no_image_is_rejected():
    with pytest.raises(ConfigError, match="K >= 2"):
        draw("soft", torch.ones(4, 1), [0])
    with pytest.raises(ConfigError, match="N >= 1"):
        draw("soft", torch.ones(0, 3), [0])


# Distributions of the draws


def test_images_are_drawn_uniformly():
    counts = draw("soft", some_q(), range(12_000)).row_S.bincount(minlength=6)
    assert chi_square_p(counts, [2000] * 6) > 1e-3


def test_pre_training_labels_are_uniform():
    counts = draw_classes(7, 3, "pp", range(14_000)).bincount(minlength=7)
    assert chi_square_p(counts, [2000] * 7) > 1e-3


def test_marginal_draws_follow_the_mean_condition():
    q, num = some_q(), 20_000
    counts = draw("marginal", q, range(num)).condition_SK.sum(dim=0)
    mean = q.double().mean(dim=0)
    assert chi_square_p(counts.double(), mean / mean.sum() * num) > 1e-3


def test_a_class_drawn_from_a_soft_condition_has_the_marginal_distribution():
    q, num = some_q(), 20_000
    soft = draw("soft", q, range(num)).condition_SK
    rng = torch.Generator().manual_seed(5)
    drawn = torch.multinomial(soft, 1, generator=rng).flatten().bincount(minlength=5)
    marginal = draw("marginal", q, range(num)).condition_SK.sum(dim=0)
    table = torch.stack([drawn.double(), marginal.double()])
    assert stats.chi2_contingency(table).pvalue > 1e-3
    # The same test distinguishes the uniform control from both.
    uniform = draw("uniform", q, range(num)).condition_SK.sum(dim=0)
    assert stats.chi2_contingency(torch.stack([drawn, uniform])).pvalue < 1e-6


def test_a_class_of_probability_zero_is_never_drawn():
    q = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    drawn = draw("marginal", q, range(4000)).condition_SK.sum(dim=0)
    assert (drawn[[0, 2, 4]] == 0).all()
    assert (drawn[[1, 3]] > 0).all()


def test_the_uniform_control_draws_every_class_for_any_q():
    q = one_hot(torch.zeros(4, dtype=torch.int64), 5)
    counts = draw("uniform", q, range(10_000)).condition_SK.sum(dim=0)
    assert chi_square_p(counts.double(), [2000] * 5) > 1e-3


# Identity of the draws


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_depend_on_worker_or_order(kind):
    q = some_q()
    alone = draw(kind, q, range(64))
    shares = [draw(kind, q, range(worker, 64, 4)) for worker in (3, 1, 0, 2)]
    for worker, (condition, row) in zip((3, 1, 0, 2), shares, strict=True):
        assert torch.equal(condition, alone.condition_SK[worker::4])
        assert torch.equal(row, alone.row_S[worker::4])


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_or_purpose_draws_different_conditions(kind):
    q, config = some_q(num_rows=40), ConditionConfig(kind=kind, k=2)
    drawn = [
        draw_conditions(q, config, run_seed=s, purpose=p, sample_indices=range(40)).condition_SK
        for s, p in [(0, "a"), (1, "a"), (0, "b")]
    ]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_draws_do_not_change_the_global_generators():
    state = torch.get_rng_state()
    source_probabilities(classifier_without_draws(), some_images(3))
    draw("soft", some_q(), range(5))
    draw("marginal", some_q(), range(5))
    assert torch.equal(state, torch.get_rng_state())


def classifier_without_draws():
    with torch.random.fork_rng():
        return classifier(3)


@pytest.mark.parametrize("draws", [source_probabilities, draw_conditions, draw_classes])
def test_target_labels_cannot_enter_a_condition(draws):
    # Stronger than permuting them: there is no argument for labels.
    given = set(inspect.signature(draws).parameters)
    assert given <= {
        *("classifier", "images", "temperature", "batch_size", "num_classes"),
        *("q_NK", "config", "run_seed", "purpose", "sample_indices"),
    }


def test_conditions_of_permuted_images_are_the_permuted_conditions():
    # So splitting by class or renaming classes cannot change how often an image is drawn.
    network, images = classifier(5), some_images(10)
    order = torch.from_numpy(numpy_rng(0, "order").permutation(10))
    q = source_probabilities(network, images)
    torch.testing.assert_close(source_probabilities(network, images[order]), q[order])


# Entropy


def test_entropy_is_zero_for_one_class_and_log_k_for_all():
    rows = torch.tensor([[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]])
    expected = torch.tensor([0.0, math.log(4), math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(condition_entropy(rows), expected)
