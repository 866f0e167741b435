"""Moment sums over a range of sample chunks, and their form as named tensors.

Workers sum disjoint ranges; merged in the order of the chunks, the sums do not depend on how many
workers there are.

Shape suffixes: K = features, D = inputs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor

from dist_tl.methods.hidden_manifold.activations import Activation
from dist_tl.methods.hidden_manifold.gaussian_model import chunk_bins, chunk_moments
from dist_tl.methods.hidden_manifold.moments import BinSums, MomentSums, Sums
from dist_tl.methods.hidden_manifold.sampling import Task
from dist_tl.seeds import torch_rng

AnySums = TypeVar("AnySums", bound=Sums)


def sum_chunks(
    task: Task,
    weights_KD: Tensor,
    activation: Activation,
    chunks: Sequence[tuple[int, int]],
    *,
    seed: int,
    binned: bool,
) -> tuple[MomentSums, BinSums | None]:
    """Sums moments over some chunks of samples, holding two partial sums at a time.

    Args:
        chunks: index and size of each; chunk i is drawn from torch_rng(seed, "moments", i).
        binned: whether to also sum in bins of the teacher's field, for the mixture theory.
    """
    args = task, weights_KD, activation
    plain = _total(
        chunk_moments(*args, size, rng=torch_rng(seed, "moments", i)) for i, size in chunks
    )
    if not binned:
        return plain, None
    bins = _total(chunk_bins(*args, size, rng=torch_rng(seed, "moments", i)) for i, size in chunks)
    return plain, bins


def sums_to_tensors(plain: MomentSums, bins: BinSums | None) -> dict[str, Tensor]:
    """Returns all sums as tensors, named by kind and field."""
    return {
        f"{prefix}/{field.name}": torch.as_tensor(getattr(sums, field.name)).contiguous()
        for prefix, sums in (("plain", plain), ("bins", bins))
        if sums is not None
        for field in fields(sums)
    }


def sums_from_tensors(
    parts: Sequence[Mapping[str, Tensor]],
) -> tuple[MomentSums, BinSums | None]:
    """Merges the sums of several workers, in the order of their chunks."""
    plain = _total(_from_tensors(MomentSums, "plain", part) for part in parts)
    if not any(name.startswith("bins/") for name in parts[0]):
        return plain, None
    return plain, _total(_from_tensors(BinSums, "bins", part) for part in parts)


def _total(parts: Iterator[AnySums]) -> AnySums:
    total = next(parts)
    for part in parts:
        total.accumulate(part)
    return total


def _from_tensors(kind: type[AnySums], prefix: str, tensors: Mapping[str, Tensor]) -> AnySums:
    values = [tensors[f"{prefix}/{field.name}"] for field in fields(kind)]
    return kind(*(v if v.ndim else v.item() for v in values))
