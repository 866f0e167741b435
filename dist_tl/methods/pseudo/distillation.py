"""Knowledge distillation, the baseline for P-SSL.

The teacher is the source classifier, fine-tuned on the target labels with a head of C classes; it
may have any architecture and gets no gradient.

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
    """The distillation loss of a student."""

    kind: Literal["soft_targets", "logit_matching"] = Field(
        default="soft_targets",
        description="Match softened probabilities in addition to labels, or match logits only.",
    )
    temperature: float = Field(
        default=4.0, gt=0, description="Divides both logits; soft_targets only."
    )
    label_weight: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Weight of the labels' cross-entropy; soft_targets only.",
    )


class MeanTeacher(nn.Module):
    """An ensemble of teachers; its softmax at the temperature is the mean of theirs.

    Args:
        temperature: temperature of the distillation loss.
    """

    def __init__(self, teachers: Sequence[nn.Module], temperature: float) -> None:
        super().__init__()
        self.teachers, self._temperature = nn.ModuleList(teachers), temperature

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (B, C), float32."""
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
    """Returns a CE(student, labels) + (1 - a) T^2 KL(teacher / T || student / T), float32, in nats.

    The factor T^2 makes the gradient of the softened term independent of the temperature's scale.

    Raises:
        ValueError: logits of unequal shapes.
    """
    student_BC, teacher_BC = _matching(student_BC, teacher_BC)
    log_teacher_BC = (teacher_BC / temperature).log_softmax(dim=1)
    log_student_BC = (student_BC / temperature).log_softmax(dim=1)
    divergence = functional.kl_div(
        log_student_BC, log_teacher_BC, reduction="batchmean", log_target=True
    )
    cross_entropy = functional.cross_entropy(student_BC, labels_B)
    return label_weight * cross_entropy + (1 - label_weight) * temperature**2 * divergence


def logit_matching_loss(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """Returns the mean squared difference of the logits over batch and classes, float32 scalar.

    Raises:
        ValueError: logits of unequal shapes.
    """
    return functional.mse_loss(*_matching(student_BC, teacher_BC))


def _matching(student_BC: Tensor, teacher_BC: Tensor) -> tuple[Tensor, Tensor]:
    if student_BC.shape != teacher_BC.shape or student_BC.ndim != 2:
        raise ValueError(
            f"expected student and teacher logits of equal shape (B, C), got "
            f"{tuple(student_BC.shape)} and {tuple(teacher_BC.shape)}"
        )
    return student_BC.float(), teacher_BC.detach().float()
