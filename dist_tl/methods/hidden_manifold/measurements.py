"""Test errors on the target task, measured on simulated draws and predicted by theory.

All arms of one instance share their latent draws and test samples, so differences between arms and
cells are paired.

Shape suffixes: N = samples, D = inputs, K = hidden units, S = training set sizes, L = penalties,
R = readouts (S x draws x L).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from dist_tl.config import StrictModel
from dist_tl.errors import NotConvergedError
from dist_tl.methods.hidden_manifold.activations import Activation
from dist_tl.methods.hidden_manifold.gaussian_model import CHUNK, hidden_features
from dist_tl.methods.hidden_manifold.mixture import solve_mixture
from dist_tl.methods.hidden_manifold.moments import BinSums, Covariances
from dist_tl.methods.hidden_manifold.readout import Loss, fit_path
from dist_tl.methods.hidden_manifold.saddle_point import Spectrum, solve_path, spectrum
from dist_tl.methods.hidden_manifold.sampling import Chunk, Task, sample_chunk
from dist_tl.methods.hidden_manifold.student import (
    Student,
    draw_student,
    scratch_training,
    train_student,
)
from dist_tl.seeds import torch_rng

VALIDATION_SAMPLES = 4000  # fresh samples that choose the epoch of arms trained end to end


class Measurement(StrictModel):
    """Test errors of one arm, training set size and penalty, over the draws of an instance."""

    arm: str
    samples: int = Field(description="Training set size n.")
    lam: float | None = Field(default=None, description="Absent for arms without a readout fit.")
    errors: tuple[float, ...] = Field(description="Test error of every draw.")
    theory: float | None = Field(default=None, description="Error of the Gaussian theory.")
    mixture: float | None = Field(default=None, description="Error of the mixture theory.")
    failure: str = Field(default="", description="Why the Gaussian theory has no solution.")

    @property
    def mean(self) -> float:
        """Mean test error over the draws."""
        return sum(self.errors) / len(self.errors)


@dataclass(frozen=True, eq=False)
class Experiment:
    """A target task with its training and test sets, and the readouts to fit on them.

    Attributes:
        seed: seed of the instance.
        hidden: hidden units K.
        sizes: training set sizes n.
        draws: training sets of each size.
        lams: penalties of each readout.
    """

    task: Task
    seed: int
    hidden: int
    activation: Activation
    sizes: tuple[int, ...]
    draws: int
    test_samples: int
    lams: tuple[float, ...]
    loss: Loss

    def training_set(self, num: int, draw: int) -> Chunk:
        """Returns training set `draw` of `num` samples."""
        return sample_chunk(self.task, num, rng=torch_rng(self.seed, "target draw", draw, num))

    def test_chunks(self) -> Iterator[Chunk]:
        """Yields the test set in chunks."""
        for index, first in enumerate(range(0, self.test_samples, CHUNK)):
            size = min(CHUNK, self.test_samples - first)
            yield sample_chunk(self.task, size, rng=torch_rng(self.seed, "target test", index))


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """A fixed first layer.

    Attributes:
        mean_K: subtracted from the features if their activation is not odd.
    """

    weights_KD: Tensor
    activation: Activation
    mean_K: Tensor | None = None

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Returns features (N, K) float64."""
        v_NK = hidden_features(self.weights_KD, x_ND, self.activation)
        return v_NK if self.mean_K is None else v_NK - self.mean_K


def measure_readouts(
    arm: str, features: FeatureMap, experiment: Experiment, covariances: Covariances
) -> list[Measurement]:
    """Measures readouts on fixed features, one for each training set size and penalty.

    Args:
        covariances: second moments of latents and features, for the Gaussian theory.
    """
    errors_SDL = _simulated_errors(features, experiment)
    law = spectrum(
        covariances.psi_dd, covariances.phi_dK, covariances.omega_KK, experiment.task.teacher_d
    )
    measurements = []
    for num, errors_DL in zip(experiment.sizes, errors_SDL, strict=True):
        theory_L, failure = _theory_errors(law, num, experiment)
        measurements += [
            Measurement(
                arm=arm,
                samples=num,
                lam=lam,
                errors=tuple(errors_D.tolist()),
                theory=theory,
                failure=failure,
            )
            for lam, errors_D, theory in zip(experiment.lams, errors_DL.T, theory_L, strict=True)
        ]
    return measurements


def with_mixture(
    measurements: Sequence[Measurement], bins: BinSums, *, lam: float, loss: Loss
) -> list[Measurement]:
    """Adds the mixture theory to the measurements at penalty `lam`.

    The error stays None at training set sizes at which the theory does not converge.
    """
    law = bins.moments()
    errors: dict[int, float | None] = {}
    for num in {measurement.samples for measurement in measurements}:
        alpha = num / law.mu_BK.shape[1]
        try:
            solution = solve_mixture(
                law.p_B, law.mu_BK, law.cov_BKK, alpha=alpha, lam=lam, loss=loss
            )
            errors[num] = solution.error
        except NotConvergedError:
            errors[num] = None
    return [
        m.model_copy(update={"mixture": errors[m.samples]}) if m.lam == lam else m
        for m in measurements
    ]


def measure_students(
    arm: str, experiment: Experiment, first_layer_KD: Tensor | None = None
) -> list[Measurement]:
    """Measures students whose layers are both trained on the target task.

    Args:
        first_layer_KD: pretrained first layer, float32; None starts from random weights.
    """
    seed, task, activation = experiment.seed, experiment.task, experiment.activation
    validation = sample_chunk(task, VALIDATION_SAMPLES, rng=torch_rng(seed, "validation"))
    test = list(experiment.test_chunks())
    measurements = []
    for num in experiment.sizes:
        errors = []
        for draw in range(experiment.draws):
            rng = torch_rng(seed, f"{arm} weights", draw, num)
            student = draw_student(task.inputs, experiment.hidden, activation, rng=rng)
            if first_layer_KD is not None:
                student = Student(first_layer_KD, student.readout_K, activation)
            x_ND, y_N, _ = experiment.training_set(num, draw)
            student = train_student(
                student,
                x_ND,
                y_N,
                scratch_training(num),
                rng=torch_rng(seed, f"{arm} order", draw, num),
                validation=(validation.x_ND, validation.y_N),
            )
            wrong = sum(student.error_rate(c.x_ND, c.y_N) * len(c.y_N) for c in test)
            errors.append(wrong / experiment.test_samples)
        measurements.append(Measurement(arm=arm, samples=num, errors=tuple(errors)))
    return measurements


def best_simulated(paths: Sequence[Sequence[Measurement]]) -> list[float]:
    """Returns simulated errors at the penalty with the lowest mean over instances.

    Args:
        paths: measurements of each instance, one for each penalty in the same order.
    """
    rows = [[measurement.mean for measurement in path] for path in paths]
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    best = means.index(min(means))
    return [row[best] for row in rows]


def best_theory(paths: Sequence[Sequence[Measurement]]) -> list[float] | None:
    """Returns the lowest theory error of each instance; None if any error is missing."""
    errors = [[m.theory for m in path if m.theory is not None] for path in paths]
    if sum(map(len, errors)) < sum(map(len, paths)):
        return None
    return [min(path) for path in errors]


def _simulated_errors(features: FeatureMap, experiment: Experiment) -> Tensor:
    """Test errors of fitted readouts, (sizes, draws, penalties) float64."""
    fits = []
    for num in experiment.sizes:
        for draw in range(experiment.draws):
            x_ND, y_N, _ = experiment.training_set(num, draw)
            fits.append(fit_path(features(x_ND), y_N, experiment.lams, experiment.loss).T)
    w_KR = torch.cat(fits, dim=1)
    wrong_R = torch.zeros(w_KR.shape[1], dtype=torch.float64)
    for x_ND, y_N, _ in experiment.test_chunks():
        wrong_R += (features(x_ND) @ w_KR * y_N[:, None] <= 0).sum(dim=0)
    shape = len(experiment.sizes), experiment.draws, len(experiment.lams)
    return (wrong_R / experiment.test_samples).view(shape)


def _theory_errors(
    law: Spectrum, num: int, experiment: Experiment
) -> tuple[list[float | None], str]:
    """Errors of the Gaussian theory by penalty; Nones and the reason if it does not converge."""
    lams, alpha = experiment.lams, num / len(law.omega_K)
    try:
        path = solve_path(law, alpha=alpha, lams=lams, loss=experiment.loss)
    except NotConvergedError as error:
        return [None] * len(lams), str(error)
    return [solution.error for solution in path], ""
