"""Tasks and samples: effects and invariants of the knobs, and exact classes."""

import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from dist_tl.errors import ConfigError
from dist_tl.methods.hidden_manifold.sampling import (
    Knobs,
    ManifoldConfig,
    ManifoldGenerator,
    Task,
    draw_tasks,
    sample_chunk,
)
from dist_tl.models.generators.protocol import check_condition
from dist_tl.seeds import row_rngs, torch_rng

KNOBS = [
    {"feature_corr": 0.6},
    {"substituted": 0.4},
    {"teacher_corr": 0.3},
    {"feature_corr": 0.0, "substituted": 1.0, "teacher_corr": 0.0},
]


def tasks(seed=3, **options):
    knobs = {key: options.pop(key) for key in list(options) if key in Knobs.model_fields}
    sizes = {"source_latent": 40, "target_latent": 40, "inputs": 120}
    return draw_tasks(ManifoldConfig(**{**sizes, **options}, knobs=Knobs(**knobs)), seed=seed)


def same(one, other):
    return torch.equal(one.features_dD, other.features_dD) and torch.equal(
        one.teacher_d, other.teacher_d
    )


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def changed_rows(fraction):
    source, target = tasks(substituted=fraction)
    rows = (source.features_dD != target.features_dD).any(dim=1)
    return set(rows.nonzero().flatten().tolist())


# Knobs


def test_the_default_knobs_make_the_target_the_source():
    assert same(*tasks())


@pytest.mark.parametrize("knobs", KNOBS)
def test_the_source_does_not_depend_on_the_knobs(knobs):
    assert same(tasks(**knobs).source, tasks().source)


@pytest.mark.parametrize("target_latent", [1, 39, 41, 100])
def test_the_source_does_not_depend_on_the_size_of_the_target(target_latent):
    assert same(tasks(target_latent=target_latent).source, tasks().source)


@pytest.mark.parametrize("c", [0.2, 0.8])
def test_a_knob_mixes_the_same_independent_draw(c):
    source, fresh = tasks(feature_corr=0.0, teacher_corr=0.0)
    mixed = tasks(feature_corr=c, teacher_corr=c).target
    rest = math.sqrt(1 - c * c)
    torch.testing.assert_close(mixed.features_dD, c * source.features_dD + rest * fresh.features_dD)
    torch.testing.assert_close(mixed.teacher_d, c * source.teacher_d + rest * fresh.teacher_d)


def test_knobs_are_independent():
    both = tasks(feature_corr=0.5, teacher_corr=0.5).target
    assert torch.equal(both.features_dD, tasks(feature_corr=0.5).target.features_dD)
    assert torch.equal(both.teacher_d, tasks(teacher_corr=0.5).target.teacher_d)


@pytest.mark.parametrize("c", [0.0, 0.3, 0.7])
def test_features_have_the_configured_correlation(c):
    source, target = tasks(feature_corr=c)
    # The standard error of a correlation c over 4800 pairs is (1 - c^2) / sqrt(4800).
    assert correlation(source.features_dD, target.features_dD) == pytest.approx(c, abs=0.045)


def test_teachers_have_the_configured_correlation():
    source, target = tasks(source_latent=4000, target_latent=4000, inputs=1, teacher_corr=0.6)
    assert correlation(source.teacher_d, target.teacher_d) == pytest.approx(0.6, abs=0.04)


def test_substituted_rows_have_the_configured_number_and_are_nested():
    sets = [changed_rows(fraction) for fraction in (0.0, 0.1, 0.25, 0.5, 1.0)]
    assert [len(rows) for rows in sets] == [0, 4, 10, 20, 40]
    assert all(few < more for few, more in pairwise(sets))


def test_substituted_rows_depend_on_the_seed():
    def rows(seed):
        source, target = tasks(seed=seed, substituted=0.5)
        return (source.features_dD != target.features_dD).any(dim=1).tolist()

    assert rows(1) != rows(2)
    assert rows(1) != [True] * 20 + [False] * 20


def test_a_substituted_row_is_independent_of_the_source():
    source, target = tasks(substituted=1.0, feature_corr=1.0)
    assert abs(correlation(source.features_dD, target.features_dD)) < 0.045


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("target_latent", [20, 40, 60])
def test_the_target_is_standard_normal_for_all_knobs(knobs, target_latent):
    target = tasks(target_latent=target_latent, **knobs).target
    assert stats.kstest(target.features_dD.flatten().numpy(), "norm").pvalue > 1e-3
    wide = tasks(source_latent=500, target_latent=900, inputs=1, **knobs).target
    assert stats.kstest(wide.teacher_d.numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("target_latent", [1, 25, 40, 64])
def test_the_first_latents_are_shared_and_the_rest_is_independent(target_latent):
    source, target = tasks(target_latent=target_latent)
    shared = min(40, target_latent)
    assert target.features_dD.shape == (target_latent, 120)
    assert torch.equal(source.features_dD[:shared], target.features_dD[:shared])
    assert torch.equal(source.teacher_d[:shared], target.teacher_d[:shared])
    assert same(target, Task(*(x[:target_latent] for x in wide_target()), "tanh"))


def wide_target():
    target = tasks(target_latent=64).target
    return target.features_dD, target.teacher_d


def test_the_teachers_of_unequal_sizes_overlap_by_the_root_of_the_ratio():
    source, target = tasks(source_latent=4000, target_latent=8000, inputs=1)
    overlap = source.teacher_d @ target.teacher_d[:4000]
    cosine = float(overlap / source.teacher_d.norm() / target.teacher_d.norm())
    assert cosine == pytest.approx(math.sqrt(0.5), abs=0.03)


def test_another_seed_draws_different_tasks():
    assert correlation(tasks(seed=1).source.features_dD, tasks(seed=2).source.features_dD) < 0.05
    assert same(tasks(seed=1).source, tasks(seed=1).source)


def test_draws_do_not_change_the_global_generator():
    state = torch.get_rng_state()
    sample_chunk(tasks(feature_corr=0.5).target, 5, rng=torch_rng(0, "x"))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("field", ["feature_corr", "substituted", "teacher_corr"])
@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan])
def test_a_knob_out_of_its_range_is_rejected(field, value):
    with pytest.raises(ValidationError, match=field):
        Knobs(**{field: value})


def test_a_task_with_mismatched_parts_is_rejected():
    with pytest.raises(ValueError, match="teacher"):
        Task(torch.zeros(3, 4).double(), torch.zeros(4).double(), "tanh")
    with pytest.raises(ValueError, match="float64"):
        Task(torch.zeros(3, 4), torch.zeros(3), "tanh")


# Samples


@pytest.mark.parametrize("num", [0, 1, 7])
def test_a_chunk_has_the_documented_shapes_and_types(num):
    x, y, c = sample_chunk(tasks().source, num, rng=torch_rng(0, "x"))
    assert (x.shape, y.shape, c.shape) == ((num, 120), (num,), (num, 40))
    assert (x.dtype, y.dtype, c.dtype) == (torch.float32, torch.float64, torch.float64)
    assert set(y.tolist()) <= {-1.0, 1.0}


def test_inputs_and_labels_are_functions_of_the_latents():
    task = tasks().source
    x, y, c = sample_chunk(task, 50, rng=torch_rng(0, "x"))
    expected = torch.tanh(sum(c[:, [i]] * task.features_dD[i] for i in range(40)) / math.sqrt(40))
    torch.testing.assert_close(x, expected.float())
    assert torch.equal(y, (c * task.teacher_d).sum(dim=1).sign())


def test_latents_are_standard_normal_and_labels_balanced():
    _, y, c = sample_chunk(tasks().source, 4000, rng=torch_rng(0, "x"))
    assert stats.kstest(c.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(float(y.mean())) < 4 / math.sqrt(4000)


def test_a_latent_on_the_decision_boundary_has_a_label():
    task = Task(torch.ones(2, 3).double(), torch.zeros(2).double(), "tanh")
    assert sample_chunk(task, 4, rng=torch_rng(0, "x")).y_N.tolist() == [1.0] * 4


def test_a_chunk_depends_on_its_generator_only():
    task = tasks().source
    one, same_one, other = (sample_chunk(task, 5, rng=torch_rng(0, "x", i)) for i in (0, 0, 1))
    assert torch.equal(one.x_ND, same_one.x_ND)
    assert not torch.equal(one.x_ND, other.x_ND)


def test_a_negative_number_of_samples_is_rejected():
    with pytest.raises(ValueError, match="num >= 0"):
        sample_chunk(tasks().source, -1, rng=torch_rng(0, "x"))


# The conditional generator


def one_hot(*classes):
    return torch.eye(2)[list(classes)].reshape(-1, 2)


def generate(task, classes, rows=None):
    rows = range(len(classes)) if rows is None else rows
    return ManifoldGenerator(task).sample(one_hot(*classes), rng=row_rngs(5, "noise", rows))


def label_of(task, x):
    """Returns the label of an input of a linear task, where x = c F / sqrt(d) determines c."""
    c = torch.linalg.lstsq(task.features_dD.T, torch.atanh(x.double()).flatten(1).T).solution
    return (task.teacher_d @ c).sign()


def test_every_sample_has_the_requested_class():
    # Few latents and small features keep tanh far from 1, where float32 could not be inverted.
    few = tasks(source_latent=10).source
    task = Task(0.3 * few.features_dD, few.teacher_d, "tanh")
    classes = [0, 1, 1, 0] * 30
    x = generate(task, classes)
    assert label_of(task, x).tolist() == [2.0 * k - 1 for k in classes]


@pytest.mark.parametrize("activation", ["tanh", "erf"])
def test_the_other_class_of_the_same_draw_is_its_mirror_image(activation):
    task = tasks(input_activation=activation).source
    assert torch.equal(generate(task, [0] * 6), -generate(task, [1] * 6))


def test_samples_have_the_distribution_of_their_class():
    task = tasks(source_latent=5, target_latent=5, inputs=8).source
    drawn = generate(task, [1] * 4000).flatten(1)
    x, y, _ = sample_chunk(task, 8000, rng=torch_rng(0, "x"))
    own = [stats.ks_2samp(drawn[:, i], x[y > 0][:, i]).pvalue for i in range(8)]
    both = [stats.ks_2samp(drawn[:, i], x[:, i]).pvalue for i in range(8)]
    assert min(own) > 1e-4
    assert min(both) < 1e-9  # so the test distinguishes one class from both


def test_a_row_does_not_depend_on_its_batch():
    task = tasks().source
    together = generate(task, [0, 1, 1, 0, 1])
    alone = torch.cat([generate(task, [k], rows=[i]) for i, k in enumerate([0, 1, 1, 0, 1])])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("num", [0, 1, 3])
def test_samples_are_images_of_one_row(num):
    generator = ManifoldGenerator(tasks().source)
    x = generator.sample(one_hot(*[1] * num), rng=row_rngs(0, "noise", range(num)))
    assert (generator.num_classes, generator.image_shape) == (2, (1, 1, 120))
    assert x.shape == (num, *generator.image_shape)
    assert x.dtype == torch.float32
    assert (x.abs() <= 1).all()


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_inputs_outside_the_range_of_images_are_rejected(activation):
    with pytest.raises(ConfigError, match=f"tanh or erf, got {activation}"):
        ManifoldGenerator(tasks(input_activation=activation).source)


@pytest.mark.parametrize("row", [[0.5, 0.5], [0.0, 0.0], [1.0, 1.0], [1.1, -0.1], [math.nan, 1.0]])
def test_a_condition_that_is_not_one_hot_is_rejected_and_named(row):
    condition = torch.tensor([[1.0, 0.0], row])
    with pytest.raises(ValueError, match=r"row 1 of 2 .* one-hot"):
        ManifoldGenerator(tasks().source).sample(condition, rng=row_rngs(0, "noise", range(2)))


@pytest.mark.parametrize("condition", [torch.ones(2, 3), torch.ones(2), torch.eye(2).double()])
def test_an_invalid_condition_has_the_same_error_as_in_the_protocol(condition):
    with pytest.raises(ConfigError, match="expected"):
        check_condition(condition, 2)
    with pytest.raises(ConfigError, match="expected"):
        ManifoldGenerator(tasks().source).sample(condition, rng=row_rngs(0, "noise", range(2)))


def test_every_row_needs_one_generator():
    generator = ManifoldGenerator(tasks().source)
    with pytest.raises(ValueError, match="got a single generator"):
        generator.sample(one_hot(0, 1), rng=torch_rng(0, "noise"))
    with pytest.raises(ValueError, match="each of 2 rows, got 3"):
        generator.sample(one_hot(0, 1), rng=row_rngs(0, "noise", range(3)))
