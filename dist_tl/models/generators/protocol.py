"""The interface of every generator and the checks of its inputs.

A condition is a probability vector over the source classes. Every row has its own random generator,
so that sample number s is the same image in every batch, on every worker and after every retry (up
to rounding, which depends on the batch size).
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dist_tl.errors import ConfigError, NumericsError

# The sum of a float32 softmax is off by about 1e-7 times the square root of its width.
_SUM_TOLERANCE = 1e-5


class ConditionalGenerator(Protocol):
    """Maps conditions to images, with frozen weights."""

    num_classes: int
    image_shape: tuple[int, int, int]

    def sample(self, condition: Tensor, *, rng: Sequence[torch.Generator]) -> Tensor:
        """Generates one image per row of `condition`.

        Args:
            condition: (N, K) float32, every row on the simplex over the K source classes.
            rng: N generators; row i draws from rng[i] only.

        Returns:
            (N, C, H, W) float32 in [-1, 1], on the device of `condition`.

        Raises:
            ConfigError: `condition` has the wrong shape or dtype, or a row is not on the simplex.
            ValueError: the number of generators differs from the number of rows.
            NumericsError: an image contains NaN or infinity; the message names its row.
        """
        ...


def check_condition(condition: Tensor, num_classes: int) -> None:
    """Checks that `condition` is (N, num_classes) float32 with rows on the simplex.

    Raises:
        ConfigError: wrong shape or dtype, a value that is negative or not finite, or a row whose
            sum is further than 1e-5 from 1. The message names the first invalid row.
    """
    shape = tuple(condition.shape)
    if len(shape) != 2 or shape[1] != num_classes:
        raise ConfigError(f"condition: expected shape (N, {num_classes}), got {shape}")
    if condition.dtype != torch.float32:
        raise ConfigError(f"condition: expected float32, got {condition.dtype}")
    _reject_rows(~condition.isfinite().all(dim=1), "contains a value that is not finite")
    _reject_rows((condition < 0).any(dim=1), "contains a negative probability")
    excess = condition.sum(dim=1, dtype=torch.float64) - 1.0
    _reject_rows(excess.abs() > _SUM_TOLERANCE, "does not sum to 1; normalise it (softmax)")


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Checks that `labels` is (N,) int64 in 0..num_classes-1.

    Raises:
        ValueError: wrong shape or dtype, or a label out of range.
    """
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise ValueError(f"labels: expected (N,) int64, got {tuple(labels.shape)} {labels.dtype}")
    # Most embedding tables have a row num_classes, which would silently mean "no class".
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise ValueError(f"labels: expected 0..{num_classes - 1}, got {int(outside[0])}")


def check_rng(rng: Sequence[torch.Generator], num_rows: int) -> None:
    """Checks that there is one generator per row.

    Raises:
        ValueError: `rng` is a single generator or has the wrong length.
    """
    if isinstance(rng, torch.Generator) or len(rng) != num_rows:
        count = "a single generator" if isinstance(rng, torch.Generator) else f"{len(rng)}"
        raise ValueError(f"rng: expected one generator for each of {num_rows} rows, got {count}")


def check_finite(finite: Tensor) -> None:
    """Checks that all rows of a batch are finite.

    Args:
        finite: (N,) bool, whether each row is finite.

    Raises:
        NumericsError: a row is not finite; the message names the first.
    """
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise NumericsError(
            f"row {row} of {len(finite)}: the generator produced NaN or infinity; "
            "check its weights, precision and guidance_scale"
        )


def _reject_rows(invalid: Tensor, reason: str) -> None:
    if bool(invalid.any()):
        row = int(invalid.nonzero()[0])
        raise ConfigError(f"condition: row {row} of {len(invalid)} {reason}")
