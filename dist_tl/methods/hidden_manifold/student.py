"""Training of the two-layer student: sources, students from scratch, fine-tuned students.

yhat = sign(w . v / sqrt(K)), v = activation(W x / sqrt(D)), W (K, D), no biases. Adam minimises the
mean logistic loss + (decay / 2) (|w|^2 + |W|^2 / D).

Source: Gerace et al., arXiv:2106.05418, section 2 (transfer protocol). `readout.py` has exact fits
of w alone; the theory covers readouts on trained features, but not this training.

Shape suffixes: N = samples, D = inputs, K = hidden units.
"""

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from dist_tl.config import StrictModel
from dist_tl.errors import NonFiniteLossError
from dist_tl.methods.hidden_manifold.activations import Activation, apply


class TrainingConfig(StrictModel):
    """Training of both layers."""

    epochs: int = Field(default=30, ge=1, description="Passes over the samples.")
    batch_size: int = Field(
        default=256, ge=1, description="Samples per step; the last may be smaller."
    )
    learning_rate: float = Field(default=2e-3, gt=0, description="Learning rate of Adam.")
    weight_decay: float = Field(
        default=1e-5, ge=0, description="L2 penalty in the loss, not decoupled."
    )


@dataclass(frozen=True)
class Student:
    """A two-layer network, float32.

    Attributes:
        weights_KD: weights W of the hidden layer.
        readout_K: weights w of the second layer.
        activation: activation of the hidden layer.
    """

    weights_KD: Tensor
    readout_K: Tensor
    activation: Activation

    def scores(self, x_ND: Tensor) -> Tensor:
        """Returns the scores w . v / sqrt(K) of float32 inputs, (N,)."""
        hidden, inputs = self.weights_KD.shape
        v_NK = apply(self.activation, x_ND @ self.weights_KD.T / math.sqrt(inputs))
        return v_NK @ self.readout_K / math.sqrt(hidden)

    def error_rate(self, x_ND: Tensor, y_N: Tensor) -> float:
        """Returns the share of samples whose label (-1 or +1) is not the sign of the score."""
        return float((self.scores(x_ND.float()) * y_N.float() <= 0).double().mean())


def draw_student(
    inputs: int, hidden: int, activation: Activation, *, rng: torch.Generator
) -> Student:
    """Draws a student with entries N(0, 1) in both layers."""
    weights_KD = torch.randn(hidden, inputs, generator=rng)
    return Student(weights_KD, torch.randn(hidden, generator=rng), activation)


def train_student(
    start: Student,
    x_ND: Tensor,
    y_N: Tensor,
    config: TrainingConfig,
    *,
    rng: torch.Generator,
    validation: tuple[Tensor, Tensor] | None = None,
) -> Student:
    """Trains both layers of `start` on all samples; `start` does not change.

    Args:
        x_ND: float inputs.
        y_N: labels in {-1, +1}.
        rng: draws the order of samples in every epoch.
        validation: inputs and labels. If given, returns the (first) epoch with the fewest errors on
            them instead of the last epoch.

    Raises:
        ValueError: no samples, or unequal numbers of inputs and labels.
        NonFiniteLossError: training diverges.
    """
    if len(x_ND) == 0 or len(x_ND) != len(y_N):
        raise ValueError(f"expected as many inputs as labels, got {len(x_ND)} and {len(y_N)}")
    x_ND, y_N = x_ND.float(), y_N.float()
    layers = [start.weights_KD.clone().requires_grad_(), start.readout_K.clone().requires_grad_()]
    student = Student(layers[0], layers[1], start.activation)
    optimizer = torch.optim.Adam(layers, lr=config.learning_rate)
    best, fewest = start, math.inf
    for _ in range(config.epochs):
        order = torch.randperm(len(x_ND), generator=rng)
        for rows in order.split(config.batch_size):
            optimizer.zero_grad()
            _loss(student, x_ND[rows], y_N[rows], config.weight_decay).backward()
            optimizer.step()
        if (
            validation is not None
            and (errors := _detached(student).error_rate(*validation)) < fewest
        ):
            best, fewest = _detached(student), errors
    last = _detached(student)
    if not (last.weights_KD.isfinite().all() and last.readout_K.isfinite().all()):
        raise NonFiniteLossError("the student's weights are not finite; lower the learning rate")
    return last if validation is None else best


def _loss(student: Student, x_ND: Tensor, y_N: Tensor, decay: float) -> Tensor:
    loss = functional.softplus(-y_N * student.scores(x_ND)).mean()
    inputs = student.weights_KD.shape[1]
    penalty = student.readout_K.square().sum() + student.weights_KD.square().sum() / inputs
    return loss + 0.5 * decay * penalty


def _detached(student: Student) -> Student:
    weights_KD, readout_K = student.weights_KD.detach(), student.readout_K.detach()
    return Student(weights_KD.clone(), readout_K.clone(), student.activation)


def scratch_training(num_samples: int) -> TrainingConfig:
    """Returns the training from scratch on `num_samples` samples (section 2, arm 2L)."""
    epochs = int(min(150, max(25, 60_000 / num_samples)))
    return TrainingConfig(epochs=epochs, batch_size=min(64, num_samples))
