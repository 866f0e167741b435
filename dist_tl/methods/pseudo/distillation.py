"""Knowledge distillation, the baseline that P-SSL is compared with.

The teacher is the source classifier, fine-tuned on the target labels with a head of C classes; it
may have any architecture, and receives no gradient.

Sources: Hinton, Vinyals, Dean, arXiv:1503.02531 (soft targets); Ba, Caruana, arXiv:1312.6184
(logit matching).

Shape suffixes: B = labelled batch, C = target classes.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from dist_tl.config import StrictModel


class DistillationConfig(StrictModel):
    """How the student follows its teacher."""

    kind: Literal["soft_targets", "logit_matching"] = Field(
        default="soft_targets",
        description="Softened probabilities together with labels, or bare logits.",
    )
    temperature: float = Field(
        default=4.0, gt=0, description="Divides both logits; soft_targets only."
    )
    label_weight: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of the labels' cross-entropy; soft_targets only.",
    )


class MeanTeacher(nn.Module):
    """Several teachers as one, whose softmax at the temperature is the mean of theirs.

    Args:
        temperature: that of the loss which the logits go into.
    """

    def __init__(self, teachers: Sequence[nn.Module], temperature: float) -> None:
        super().__init__()
        self.teachers, self._temperature = nn.ModuleList(teachers), temperature

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C), float32."""
        logits = [teacher(images).float() / self._temperature for teacher in self.teachers]
        mean_log = torch.stack([z.log_softmax(dim=1) for z in logits]).logsumexp(dim=0)
        return self._temperature * (mean_log - math.log(len(logits)))


def soft_targets_loss(
    student_BC: Tensor,
    teacher_BC: Tensor,
    labels_B: Tensor,
    *,
    temperature: float = 4.0,
    label_weight: float = 0.1,
) -> Tensor:
    """a CE(student, labels) + (1 - a) T^2 KL(teacher / T || student / T), float32 scalar in nats.

    T^2 keeps the gradient of the softened part of one size for every temperature.

    Raises:
        ValueError: logits of unequal shapes.
    """
    student_BC, teacher_BC = _matching(student_BC, teacher_BC)
    log_teacher_BC = (teacher_BC / temperature).log_softmax(dim=1)
    log_student_BC = (student_BC / temperature).log_softmax(dim=1)
    divergence = functional.kl_div(
        log_student_BC, log_teacher_BC, reduction="batchmean", log_target=True
    )
    from_labels = functional.cross_entropy(student_BC, labels_B)
    return label_weight * from_labels + (1 - label_weight) * temperature**2 * divergence


def logit_matching_loss(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """Squared difference of the logits, mean over batch and classes, float32 scalar.

    Raises:
        ValueError: logits of unequal shapes.
    """
    return functional.mse_loss(*_matching(student_BC, teacher_BC))


def _matching(student_BC: Tensor, teacher_BC: Tensor) -> tuple[Tensor, Tensor]:
    if student_BC.shape != teacher_BC.shape or student_BC.ndim != 2:
        raise ValueError(
            f"expected student and teacher logits of one shape (B, C), got "
            f"{tuple(student_BC.shape)} and {tuple(teacher_BC.shape)}"
        )
    return student_BC.float(), teacher_BC.detach().float()
