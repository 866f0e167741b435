"""What every generator offers, and what it asks of its caller.

A condition is a probability vector over the source classes. Randomness comes in as one generator
a row, so that sample number s is the same image whatever batch, worker or retry makes it (up to
the rounding that a batch size brings with it).
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dist_tl.errors import ConfigError, NumericsError

# Rows come from a float32 softmax, whose sum is off by about 1e-7 times the root of its width.
_SUM_TOLERANCE = 1e-5


class ConditionalGenerator(Protocol):
    """Turns conditions into images; frozen while it does so."""

    num_classes: int
    image_shape: tuple[int, int, int]

    def sample(self, condition: Tensor, *, rng: Sequence[torch.Generator]) -> Tensor:
        """One image for each row of `condition`.

        Args:
            condition: (N, K) float32, every row on the simplex over the K source classes.
            rng: N generators; row i draws from rng[i] and from nothing else.

        Returns:
            (N, C, H, W) float32 in [-1, 1], on the device of `condition`.

        Raises:
            ConfigError: `condition` is not what was asked for.
            ValueError: there is not one generator for each row.
            NumericsError: an image came out with NaN or infinity; the message names its row.
        """


def check_condition(condition: Tensor, num_classes: int) -> None:
    """Refuse anything but (N, num_classes) float32 with rows on the simplex.

    Raises:
        ConfigError: wrong shape or dtype, a value that is negative or not finite, or a row whose
            sum is further than 1e-5 from 1. The message names the first row at fault.
    """
    shape = tuple(condition.shape)
    if len(shape) != 2 or shape[1] != num_classes:
        raise ConfigError(f"condition: expected shape (N, {num_classes}), got {shape}")
    if condition.dtype != torch.float32:
        raise ConfigError(f"condition: expected float32, got {condition.dtype}")
    _refuse_rows(~condition.isfinite().all(dim=1), "holds a value that is not finite")
    _refuse_rows((condition < 0).any(dim=1), "holds a negative probability")
    excess = condition.sum(dim=1, dtype=torch.float64) - 1.0
    _refuse_rows(excess.abs() > _SUM_TOLERANCE, "does not sum to 1; normalise it (softmax)")


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse anything but (N,) int64 in 0..num_classes-1.

    Raises:
        ValueError: wrong shape or dtype, or a label out of range.
    """
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise ValueError(f"labels: expected (N,) int64, got {tuple(labels.shape)} {labels.dtype}")
    # Label num_classes is a row of most embedding tables and would silently mean "no class".
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise ValueError(f"labels: expected 0..{num_classes - 1}, got {int(outside[0])}")


def check_rng(rng: Sequence[torch.Generator], num_rows: int) -> None:
    """Refuse anything but one generator for each row.

    Raises:
        ValueError: `rng` is a single generator or has the wrong length.
    """
    if isinstance(rng, torch.Generator) or len(rng) != num_rows:
        count = "a single generator" if isinstance(rng, torch.Generator) else f"{len(rng)}"
        raise ValueError(f"rng: expected one generator for each of {num_rows} rows, got {count}")


def check_finite(finite: Tensor) -> None:
    """Refuse a batch in which a row left the finite numbers.

    Args:
        finite: (N,) bool.

    Raises:
        NumericsError: names the first row that is False.
    """
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise NumericsError(
            f"row {row} of {len(finite)}: the generator produced NaN or infinity; "
            "check its weights, precision and guidance_scale"
        )


def _refuse_rows(at_fault: Tensor, reason: str) -> None:
    if bool(at_fault.any()):
        row = int(at_fault.nonzero()[0])
        raise ConfigError(f"condition: row {row} of {len(at_fault)} {reason}")
