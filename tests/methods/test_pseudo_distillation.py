"""Distillation losses: closed forms and limits."""

import math

import pytest
import torch
from torch.nn import functional

from dist_tl.methods.pseudo.distillation import (
    DistillationConfig,
    logit_matching_loss,
    soft_targets_loss,
)


def some_logits(seed, num=5, num_classes=3):
    rng = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(num, num_classes, generator=rng)


LABELS = torch.tensor([0, 1, 2, 1, 0])


def test_soft_targets_have_the_textbook_value():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0 * math.log(3.0), 0.0]])
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    expected = 0.1 * math.log(2.0) + 0.9 * 16 * divergence
    loss = soft_targets_loss(student, teacher, torch.tensor([0]))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_student_that_equals_its_teacher_learns_from_labels_alone():
    logits = some_logits(0)
    expected = 0.1 * functional.cross_entropy(logits, LABELS)
    torch.testing.assert_close(soft_targets_loss(logits, logits, LABELS), expected)
    assert logit_matching_loss(logits, logits).item() == 0.0


def test_all_weight_on_labels_is_supervised_training():
    student = some_logits(0)
    torch.testing.assert_close(
        soft_targets_loss(student, some_logits(1), LABELS, label_weight=1.0),
        functional.cross_entropy(student, LABELS),
    )


def test_a_high_temperature_matches_centred_logits():
    # Hinton et al., eq. 4: T^2 KL -> sum of squared differences / (2 C) for zero-mean logits.
    student, teacher = (
        x.double() - x.double().mean(1, keepdim=True) for x in map(some_logits, (0, 1))
    )
    limit = (student - teacher).square().sum(dim=1).mean() / (2 * 3)
    loss = soft_targets_loss(student, teacher, LABELS, temperature=100.0, label_weight=0.0)
    assert loss.item() == pytest.approx(limit.item(), rel=0.05)


def test_soft_targets_are_invariant_to_a_shift_of_the_logits_and_logit_matching_is_not():
    student, teacher = some_logits(0), some_logits(1)
    torch.testing.assert_close(
        soft_targets_loss(student, teacher + 7.0, LABELS),
        soft_targets_loss(student, teacher, LABELS),
    )
    assert logit_matching_loss(student, student + 7.0).item() == pytest.approx(49.0, rel=1e-5)


def test_logit_matching_is_the_mean_over_batch_and_classes():
    student, teacher = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert logit_matching_loss(student, teacher).item() == pytest.approx(2.5)


def test_the_teacher_gets_no_gradient_and_the_student_does():
    for loss_of in (lambda s, t: soft_targets_loss(s, t, LABELS), logit_matching_loss):
        student, teacher = some_logits(0).requires_grad_(), some_logits(1).requires_grad_()
        loss_of(student, teacher).backward()
        assert teacher.grad is None
        assert student.grad.abs().sum() > 0


def test_logits_of_unequal_shapes_are_rejected():
    with pytest.raises(ValueError, match="equal shape"):
        logit_matching_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="equal shape"):
        soft_targets_loss(torch.zeros(2, 3), torch.zeros(1, 3), LABELS[:2])


def test_the_defaults_are_those_of_the_functions():
    config, student, teacher = DistillationConfig(), some_logits(0), some_logits(1)
    assert torch.equal(
        soft_targets_loss(
            student,
            teacher,
            LABELS,
            temperature=config.temperature,
            label_weight=config.label_weight,
        ),
        soft_targets_loss(student, teacher, LABELS),
    )
