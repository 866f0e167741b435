"""The points of a manifold job: test errors of fitted readouts beside their theory.

Plain functions of what is asked and the store, run as Ray tasks. All arms of one instance see the
same latent draws and the same test samples, so that differences between arms and cells are paired.

Shape suffixes: N = samples, K = hidden units, D = inputs, R = readouts.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_tl.config import StrictModel
from dist_tl.errors import NotConvergedError
from dist_tl.jobs.manifold.sources import Setting, read_sums, read_weights
from dist_tl.methods.hidden_manifold.gaussian_model import (
    CHUNK,
    hidden_features,
    random_feature_covariances,
    random_features,
)
from dist_tl.methods.hidden_manifold.mixture import solve_mixture
from dist_tl.methods.hidden_manifold.moments import BinSums, Covariances
from dist_tl.methods.hidden_manifold.readout import fit_path
from dist_tl.methods.hidden_manifold.saddle_point import Spectrum, solve_path, spectrum
from dist_tl.methods.hidden_manifold.sampling import Chunk, Task, draw_tasks, sample_chunk
from dist_tl.methods.hidden_manifold.student import (
    Student,
    draw_student,
    scratch_training,
    train_student,
)
from dist_tl.seeds import torch_rng
from dist_tl.storage.objects import ObjectStore

VALIDATION_SAMPLES = 4000  # fresh samples that choose the epoch of arms trained end to end
CENTRING_SAMPLES = 20_000


class Readouts(StrictModel):
    """Which readouts are fitted and tested."""

    samples: tuple[int, ...]
    lambdas: tuple[float, ...]
    loss: Literal["logistic", "ridge"]
    draws: int
    test_samples: int


class CellInputs(StrictModel):
    """Transferred features (and fine-tuned ones) in one cell."""

    setting: Setting
    readouts: Readouts
    source_weights: str
    sums: tuple[str, ...]
    mixture_lambda: float | None
    fine_tuned: bool


class BaselineInputs(StrictModel):
    """Random features (and training from scratch) on one target task."""

    setting: Setting
    readouts: Readouts
    two_layer: bool


class Point(StrictModel):
    """One arm with n samples and one penalty, over all draws of an instance."""

    arm: str
    samples: int
    lam: float | None = Field(default=None, description="Absent for arms without a readout fit.")
    errors: tuple[float, ...] = Field(description="Test error of every draw.")
    theory: float | None = Field(default=None, description="Of the Gaussian model.")
    mixture: float | None = Field(default=None, description="Of the mixture theory.")
    failure: str = Field(default="", description="Why there is no theory.")

    @property
    def mean(self) -> float:
        """Mean test error over the draws."""
        return sum(self.errors) / len(self.errors)


class ErrorsOutput(StrictModel):
    """All points of a cell or a baseline."""

    points: tuple[Point, ...]
    seconds: float


def measure_cell(inputs: CellInputs, store: ObjectStore) -> ErrorsOutput:
    """Transferred features in one cell: simulation, Gaussian theory, mixture theory."""
    began, setting = time.monotonic(), inputs.setting
    task = draw_tasks(setting.model, seed=setting.instance_seed).target
    weights_KD = read_weights(store, inputs.source_weights)
    plain, bins = read_sums(store, inputs.sums)
    centred = setting.activation == "relu"
    covariances = plain.covariances(centred=centred)
    mean_K = plain.sum_v_K / plain.count if centred else None
    view = _View("transferred", task, weights_KD, mean_K)
    points = _readout_points(view, setting, inputs.readouts, covariances)
    if bins is not None and inputs.mixture_lambda is not None:
        points = _with_mixture(points, bins, inputs)
    if inputs.fine_tuned:
        points += _trained_points("fine_tuned", task, setting, inputs.readouts, weights_KD.float())
    return ErrorsOutput(points=tuple(points), seconds=time.monotonic() - began)


def measure_baseline(inputs: BaselineInputs, store: ObjectStore) -> ErrorsOutput:
    """Random features, and students from scratch; the knobs leave their law alone."""
    began, setting, seed = time.monotonic(), inputs.setting, inputs.setting.instance_seed
    task = draw_tasks(setting.model, seed=seed).target
    weights_KD = random_features(
        setting.model.inputs, setting.hidden, rng=torch_rng(seed, "random features")
    )
    mean_K = None
    if setting.activation == "relu":
        x_ND = sample_chunk(task, CENTRING_SAMPLES, rng=torch_rng(seed, "centring")).x_ND
        mean_K = hidden_features(weights_KD, x_ND, setting.activation).mean(dim=0)
    covariances = random_feature_covariances(task, weights_KD, setting.activation)
    view = _View("random", task, weights_KD, mean_K)
    points = _readout_points(view, setting, inputs.readouts, covariances)
    if inputs.two_layer:
        points += _trained_points("two_layer", task, setting, inputs.readouts, None)
    return ErrorsOutput(points=tuple(points), seconds=time.monotonic() - began)


@dataclass(frozen=True)
class _View:
    """A task seen through a fixed feature map."""

    arm: str
    task: Task
    weights_KD: Tensor
    mean_K: Tensor | None  # subtracted from the features, where the activation is not odd

    def features(self, x_ND: Tensor, setting: Setting) -> Tensor:
        v_NK = hidden_features(self.weights_KD, x_ND, setting.activation)
        return v_NK if self.mean_K is None else v_NK - self.mean_K


def _training_set(task: Task, num: int, draw: int, seed: int) -> Chunk:
    return sample_chunk(task, num, rng=torch_rng(seed, "target draw", draw, num))


def _test_chunks(task: Task, num: int, seed: int) -> Iterator[Chunk]:
    for index, first in enumerate(range(0, num, CHUNK)):
        size = min(CHUNK, num - first)
        yield sample_chunk(task, size, rng=torch_rng(seed, "target test", index))


def _readout_points(
    view: _View, setting: Setting, readouts: Readouts, covariances: Covariances
) -> list[Point]:
    errors_SDL = _simulated(view, setting, readouts)
    law = spectrum(
        covariances.psi_dd, covariances.phi_dK, covariances.omega_KK, view.task.teacher_d
    )
    points = []
    for s, num in enumerate(readouts.samples):
        theory, failure = _theory(law, num / setting.hidden, readouts)
        for i, lam in enumerate(readouts.lambdas):
            points.append(
                Point(
                    arm=view.arm,
                    samples=num,
                    lam=lam,
                    errors=tuple(errors_SDL[s, :, i].tolist()),
                    theory=theory[i],
                    failure=failure,
                )
            )
    return points


def _theory(law: Spectrum, alpha: float, readouts: Readouts) -> tuple[list[float | None], str]:
    """The theory's errors, one for each penalty; none and the reason where it does not converge."""
    try:
        path = solve_path(law, alpha=alpha, lams=readouts.lambdas, loss=readouts.loss)
    except NotConvergedError as error:
        return [None] * len(readouts.lambdas), str(error)
    return [point.error for point in path], ""


def _simulated(view: _View, setting: Setting, readouts: Readouts) -> Tensor:
    """Test errors, (training set sizes, draws, penalties) float64."""
    seed, w_KR = setting.instance_seed, []
    for num in readouts.samples:
        for draw in range(readouts.draws):
            x_ND, y_N, _ = _training_set(view.task, num, draw, seed)
            v_NK = view.features(x_ND, setting)
            w_KR.append(fit_path(v_NK, y_N, readouts.lambdas, readouts.loss).T)
    all_w_KR = torch.cat(w_KR, dim=1)
    wrong_R = torch.zeros(all_w_KR.shape[1], dtype=torch.float64)
    for x_ND, y_N, _ in _test_chunks(view.task, readouts.test_samples, seed):
        z_NR = view.features(x_ND, setting) @ all_w_KR
        wrong_R += (z_NR * y_N[:, None] <= 0).sum(dim=0)
    shape = len(readouts.samples), readouts.draws, len(readouts.lambdas)
    return (wrong_R / readouts.test_samples).view(shape)


def _with_mixture(points: list[Point], bins: BinSums, inputs: CellInputs) -> list[Point]:
    law = bins.moments()
    found = {}
    for num in inputs.readouts.samples:
        try:
            found[num] = solve_mixture(
                law.p_B,
                law.mu_BK,
                law.cov_BKK,
                alpha=num / inputs.setting.hidden,
                lam=inputs.mixture_lambda,
                loss=inputs.readouts.loss,
            ).error
        except NotConvergedError:
            found[num] = None
    return [
        point.model_copy(update={"mixture": found[point.samples]})
        if point.lam == inputs.mixture_lambda
        else point
        for point in points
    ]


def _trained_points(
    arm: str, task: Task, setting: Setting, readouts: Readouts, transferred_KD: Tensor | None
) -> list[Point]:
    """Both layers trained on the target; from the transferred first layer where there is one."""
    seed = setting.instance_seed
    validation = sample_chunk(task, VALIDATION_SAMPLES, rng=torch_rng(seed, "validation"))
    test = list(_test_chunks(task, readouts.test_samples, seed))
    points = []
    for num in readouts.samples:
        errors = []
        for draw in range(readouts.draws):
            student = draw_student(
                setting.model.inputs,
                setting.hidden,
                setting.activation,
                rng=torch_rng(seed, f"{arm} weights", draw, num),
            )
            if transferred_KD is not None:
                student = Student(transferred_KD, student.readout_K, setting.activation)
            x_ND, y_N, _ = _training_set(task, num, draw, seed)
            student = train_student(
                student,
                x_ND,
                y_N,
                scratch_training(num),
                rng=torch_rng(seed, f"{arm} order", draw, num),
                validation=(validation.x_ND, validation.y_N),
            )
            wrong = sum(student.error_rate(c.x_ND, c.y_N) * len(c.y_N) for c in test)
            errors.append(wrong / readouts.test_samples)
        points.append(Point(arm=arm, samples=num, errors=tuple(errors)))
    return points
