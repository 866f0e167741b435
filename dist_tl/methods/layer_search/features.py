"""Pools block outputs to one unit vector per layer.

Normalisation removes the scale of a layer, which is arbitrary and would dominate the selection.

After Lee et al., arXiv:2111.10937; section "Features" of the notes.

Shape suffixes: N = items, D = width of one layer's vector, L = layers.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from dist_tl.config import StrictModel
from dist_tl.errors import NumericsError

MIN_NORM = 1e-12


class PoolingConfig(StrictModel):
    """Pooling of a layer's feature map to a vector."""

    kind: Literal["grid", "gap"] = Field(
        default="grid",
        description="grid: averages over grid x grid cells; gap: global average.",
    )
    grid: Literal[1, 2, 4] = Field(
        default=4, description="Cells along each side; 1 or 2 for large teachers."
    )

    @property
    def cells(self) -> int:
        """Number of cells along each side."""
        return 1 if self.kind == "gap" else self.grid


def layer_vectors(outputs: Sequence[Tensor], pooling: PoolingConfig) -> list[Tensor]:
    """Returns a unit vector for every item and layer, the penultimate layer last.

    A map (N, C, H, W) is averaged over cells, tokens (N, T, D) over tokens; the last output, the
    head's input, is used unchanged. A block whose pooled vector equals the head's input duplicates
    the penultimate layer and is omitted.

    Args:
        outputs: all block outputs of one forward pass in depth order, the head's input last.

    Returns:
        One (N, D) float32 tensor per layer; zero vectors stay zero.

    Raises:
        ValueError: no outputs, or the last one is not (N, D).
        NumericsError: a feature is not finite; the message names layer and item.
    """
    if not outputs or outputs[-1].ndim != 2:
        raise ValueError("expected block outputs that end in the head's input, (N, D)")
    last_ND = outputs[-1].float()
    vectors = [_pooled(output.float(), pooling.cells) for output in outputs[:-1]]
    kept = [v_ND for v_ND in vectors if not _is_same(v_ND, last_ND)]
    return [_unit(v_ND, layer) for layer, v_ND in enumerate([*kept, last_ND])]


def num_zero_vectors(phi_ND: Tensor) -> int:
    """Returns the number of items with a zero vector, which no classifier can distinguish."""
    return int((phi_ND == 0).all(dim=1).sum())


def _pooled(output: Tensor, cells: int) -> Tensor:
    if output.ndim == 4:
        height, width = (min(cells, side) for side in output.shape[2:])
        return functional.adaptive_avg_pool2d(output, (height, width)).flatten(1)
    return output.mean(dim=1) if output.ndim == 3 else output


def _is_same(one_ND: Tensor, other_ND: Tensor) -> bool:
    return one_ND.shape == other_ND.shape and torch.allclose(one_ND, other_ND, rtol=1e-5, atol=1e-7)


def _unit(v_ND: Tensor, layer: int) -> Tensor:
    finite_N = v_ND.isfinite().all(dim=1)
    if not bool(finite_N.all()):
        item = int((~finite_N).nonzero()[0])
        raise NumericsError(f"layer {layer}: the feature of item {item} is NaN or infinite")
    return v_ND / v_ND.norm(dim=1, keepdim=True).clamp_min(MIN_NORM)
