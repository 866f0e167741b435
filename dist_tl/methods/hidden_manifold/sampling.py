"""Two tasks on correlated hidden manifolds, and their samples.

A latent Gaussian c determines both the input, x = sigma_x(F^T c / sqrt(d)), and the label,
y = sign(theta . c). Three knobs set how much of F and theta the target shares with the source; none
changes the distribution of either task. Draws are nested: a knob only sets the share of one fixed
independent draw, so curves over a knob are smooth for a given seed.

After Gerace et al., arXiv:2106.05418.

Shape suffixes: N = samples, D = inputs, d = latent dimensions of the task.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError
from dist_tl.methods.hidden_manifold.activations import Activation, apply
from dist_tl.seeds import numpy_rng


class Knobs(StrictModel):
    """Difference between target and source; with the defaults they are identical."""

    feature_corr: float = Field(
        default=1.0, ge=0, le=1, description="c_F: the target's F is c_F F_s + sqrt(1 - c_F^2) G."
    )
    substituted: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="s: fraction of the shared rows of F that are redrawn.",
    )
    teacher_corr: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="c_T: the target's theta is c_T theta_s + sqrt(1 - c_T^2) g.",
    )


class ManifoldConfig(StrictModel):
    """Sizes of a source and a target task, and their relation."""

    source_latent: int = Field(
        default=100, ge=1, description="d_s: latent dimensions of the source."
    )
    target_latent: int = Field(
        default=100,
        ge=1,
        description="d_t: latent dimensions of the target; the first min(d_s, d_t) are shared.",
    )
    inputs: int = Field(default=500, ge=1, description="D: inputs of both tasks.")
    input_activation: Activation = Field(
        default="tanh", description="sigma_x, applied to every input."
    )
    knobs: Knobs = Field(default=Knobs(), description="Relation between the two tasks.")


@dataclass(frozen=True, eq=False)
class Task:
    """One task: the maps from latents to inputs and labels.

    Raises:
        ValueError: not (d, D) and (d,) float64 tensors.
    """

    features_dD: Tensor
    teacher_d: Tensor
    input_activation: Activation

    def __post_init__(self) -> None:
        shapes = tuple(self.features_dD.shape), tuple(self.teacher_d.shape)
        if len(shapes[0]) != 2 or shapes[1] != shapes[0][:1]:
            raise ValueError(f"expected features (d, D) and a teacher (d,), got {shapes}")
        if {self.features_dD.dtype, self.teacher_d.dtype} != {torch.float64}:
            raise ValueError(
                f"expected float64, got {self.features_dD.dtype} and {self.teacher_d.dtype}"
            )

    @property
    def latent(self) -> int:
        """Number of latent dimensions d."""
        return self.features_dD.shape[0]

    @property
    def inputs(self) -> int:
        """Number of inputs D."""
        return self.features_dD.shape[1]


class Tasks(NamedTuple):
    """A source task and a target task."""

    source: Task
    target: Task


class Chunk(NamedTuple):
    """N samples of a task with their latents."""

    x_ND: Tensor  # float32
    y_N: Tensor  # float64, -1 or +1
    c_Nd: Tensor  # float64


def draw_tasks(config: ManifoldConfig, *, seed: int) -> Tasks:
    """Draws the source and the target for a seed.

    The source depends on `seed` and its own sizes only. The independent parts G and g of the
    target and the order of substituted rows do not depend on the knobs, and those of d_t latents
    are the first ones of any larger number. A substituted row, like a row beyond d_s, is a row of
    G: it is independent of the source.

    Returns:
        Two tasks whose features and teachers are each iid N(0, 1) for all knobs.
    """
    source = Task(
        features_dD=_normal(seed, "features", config.source_latent, config.inputs),
        teacher_d=_normal(seed, "teacher", config.source_latent),
        input_activation=config.input_activation,
    )
    d_t, knobs = config.target_latent, config.knobs
    shared = min(config.source_latent, d_t)
    feature_corr_d = torch.full((shared, 1), knobs.feature_corr, dtype=torch.float64)
    feature_corr_d[_substituted_rows(seed, shared, knobs.substituted)] = 0.0
    fresh_dD = _normal(seed, "fresh features", d_t, config.inputs)
    target = Task(
        features_dD=_mix(source.features_dD, fresh_dD, feature_corr_d),
        teacher_d=_mix(
            source.teacher_d,
            _normal(seed, "fresh teacher", d_t),
            torch.full((shared,), knobs.teacher_corr, dtype=torch.float64),
        ),
        input_activation=config.input_activation,
    )
    return Tasks(source, target)


def sample_chunk(task: Task, num: int, *, rng: torch.Generator) -> Chunk:
    """Draws `num` independent samples of a task.

    Returns:
        x (N, D) float32, labels (N,) float64 of -1 and +1, latents (N, d) float64.

    Raises:
        ValueError: a negative number of samples.
    """
    if num < 0:
        raise ValueError(f"expected num >= 0, got {num}")
    c_Nd = torch.randn(num, task.latent, generator=rng, dtype=torch.float64)
    return Chunk(_inputs_of(task, c_Nd), _labels_of(task, c_Nd), c_Nd)


class ManifoldGenerator:
    """A conditional generator of one task's inputs, exact for each class.

    -c is as likely as c and has the other label. Flipping latents of the wrong class therefore
    samples x given y without rejection. Class 1 is y = +1, class 0 is y = -1.
    """

    num_classes: int = 2

    def __init__(self, task: Task) -> None:
        """Creates a generator for a task whose inputs are in [-1, 1].

        Raises:
            ConfigError: the input activation is not bounded by 1.
        """
        if task.input_activation not in ("tanh", "erf"):
            raise ConfigError(
                "input_activation: a generator's images lie in [-1, 1]; expected tanh or erf, got "
                f"{task.input_activation}"
            )
        self.task = task
        self.image_shape: tuple[int, int, int] = (1, 1, task.inputs)

    def sample(self, condition: Tensor, *, rng: Sequence[torch.Generator]) -> Tensor:
        """Generates one input per row of `condition`.

        Args:
            condition: (N, 2) float32, one-hot rows: a sample of the model has exactly one label.
            rng: N generators; row i draws its latents from rng[i] only.

        Returns:
            (N, 1, 1, D) float32 in [-1, 1], on the device of `condition`.

        Raises:
            ConfigError: `condition` is not (N, 2) float32 with one-hot rows.
            ValueError: the number of generators differs from the number of rows.
        """
        _check_one_hot(condition)
        if isinstance(rng, torch.Generator) or len(rng) != len(condition):
            count = "a single generator" if isinstance(rng, torch.Generator) else f"{len(rng)}"
            raise ValueError(
                f"rng: expected one generator for each of {len(condition)} rows, got {count}"
            )
        c_Nd = torch.empty(len(condition), self.task.latent, dtype=torch.float64)
        for row_d, row_rng in zip(c_Nd, rng, strict=True):
            row_d.normal_(generator=row_rng)
        y_N = 2.0 * condition[:, 1].cpu().double() - 1.0
        c_Nd *= (y_N * _labels_of(self.task, c_Nd))[:, None]
        return _inputs_of(self.task, c_Nd)[:, None, None, :].to(condition.device)


def _normal(seed: int, name: str, *shape: int) -> Tensor:
    # NumPy draws normals sequentially, so the rows of a smaller task are the first rows of a
    # larger one; torch draws them in blocks.
    return torch.from_numpy(numpy_rng(seed, f"manifold {name}").standard_normal(shape))


def _substituted_rows(seed: int, shared: int, fraction: float) -> Tensor:
    """Returns the indices of redrawn shared rows, int64; nested for increasing fractions."""
    key = numpy_rng(seed, "manifold substitution").random(shared)
    order = torch.from_numpy(key).argsort(stable=True)
    return order[: round(fraction * shared)]


def _mix(old: Tensor, fresh: Tensor, corr: Tensor) -> Tensor:
    """Mixes the first rows of `fresh` with those of `old` at correlation `corr`."""
    shared = len(corr)
    mixed = corr * old[:shared] + (1 - corr.square()).sqrt() * fresh[:shared]
    return torch.cat([mixed, fresh[shared:]])


def _inputs_of(task: Task, c_Nd: Tensor) -> Tensor:
    return apply(task.input_activation, c_Nd @ task.features_dD / math.sqrt(task.latent)).float()


def _labels_of(task: Task, c_Nd: Tensor) -> Tensor:
    # torch.sign would return a third label, 0, on the decision boundary.
    return torch.where(c_Nd @ task.teacher_d >= 0, 1.0, -1.0).double()


def _check_one_hot(condition: Tensor) -> None:
    shape = tuple(condition.shape)
    if len(shape) != 2 or shape[1] != 2 or condition.dtype != torch.float32:
        raise ConfigError(
            f"condition: expected shape (N, 2) float32, got {shape} {condition.dtype}"
        )
    one_hot_N = ((condition == 0) | (condition == 1)).all(dim=1) & (condition.sum(dim=1) == 1)
    if not bool(one_hot_N.all()):
        row = int((~one_hot_N).nonzero()[0])
        raise ConfigError(
            f"condition: row {row} of {len(condition)} is {condition[row].tolist()}; a sample of "
            "the hidden manifold has exactly one label: use one-hot rows (conditions of kind hard, "
            "marginal or uniform)"
        )
