"""Training of the two-layer student."""

import pytest
import torch

from dist_tl.errors import NonFiniteLossError
from dist_tl.methods.hidden_manifold.sampling import ManifoldConfig, draw_tasks, sample_chunk
from dist_tl.methods.hidden_manifold.student import (
    Student,
    TrainingConfig,
    _loss,
    draw_student,
    scratch_training,
    train_student,
)
from dist_tl.seeds import torch_rng

CONFIG = ManifoldConfig(source_latent=20, target_latent=20, inputs=60)
TASK = draw_tasks(CONFIG, seed=0).source


def samples(num, name="samples"):
    x, y, _ = sample_chunk(TASK, num, rng=torch_rng(0, name))
    return x, y


def start():
    return draw_student(60, 40, "tanh", rng=torch_rng(1, "weights"))


def train(**options):
    config = TrainingConfig(epochs=40, batch_size=64)
    return train_student(start(), *samples(2000), config, rng=torch_rng(2, "order"), **options)


def test_training_reduces_the_error():
    x, y = samples(4000, "test")
    assert start().error_rate(x, y) > 0.4
    assert train().error_rate(x, y) < 0.15


def test_equal_seeds_give_equal_students_and_do_not_change_the_start():
    begun = start()
    kept = begun.weights_KD.clone()
    one, two = (
        train_student(begun, *samples(200), TrainingConfig(epochs=2), rng=torch_rng(2, "order"))
        for _ in range(2)
    )
    assert torch.equal(one.weights_KD, two.weights_KD)
    assert torch.equal(begun.weights_KD, kept)


def test_validation_returns_the_best_epoch():
    held_out = samples(2000, "validation")
    config = TrainingConfig(epochs=60, batch_size=8, learning_rate=0.02)
    small = samples(60)
    last, best = (
        train_student(start(), *small, config, rng=torch_rng(3, "order"), validation=validation)
        for validation in (None, held_out)
    )
    assert best.error_rate(*held_out) <= last.error_rate(*held_out)


def test_no_samples_and_unequal_numbers_are_rejected():
    x, y = samples(4)
    for inputs, labels in ((x[:0], y[:0]), (x, y[:3])):
        with pytest.raises(ValueError, match="as many inputs as labels"):
            train_student(start(), inputs, labels, TrainingConfig(), rng=torch_rng(0, "order"))


def test_a_diverging_training_is_an_error():
    x, y = samples(64)
    with pytest.raises(NonFiniteLossError, match="learning rate"):
        train_student(
            start(), x * float("inf"), y, TrainingConfig(epochs=1), rng=torch_rng(0, "order")
        )


@pytest.mark.parametrize(
    ("num", "epochs", "batch"), [(10, 150, 10), (1000, 60, 64), (9999, 25, 64)]
)
def test_students_from_scratch_see_each_sample_often_enough(num, epochs, batch):
    config = scratch_training(num)
    assert (config.epochs, config.batch_size) == (epochs, batch)


def test_the_penalty_divides_the_first_layer_by_the_number_of_inputs():
    """So that it equals the readout's in weight, however many inputs there are."""
    student = Student(torch.full((2, 5), 3.0), torch.tensor([1.0, 2.0]), "tanh")
    x_ND, y_N = torch.zeros(4, 5), torch.ones(4)
    penalty = _loss(student, x_ND, y_N, 0.1) - _loss(student, x_ND, y_N, 0.0)
    assert float(penalty) == pytest.approx(0.5 * 0.1 * (5.0 + 90.0 / 5))
