"""Splits routed samples into batches per expert, and merges the experts' outputs.

Shape suffixes: B = samples, M = experts, C = target classes, S = samples of one batch.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class SubBatch(NamedTuple):
    """Samples for one expert.

    Attributes:
        expert: index of the expert in the hub.
        rows_S: int64 sample indices, ascending.
    """

    expert: int
    rows_S: Tensor


def sub_batches(active_BM: Tensor, size: int) -> list[SubBatch]:
    """Returns batches of at most `size` samples that cover every routed (sample, expert) pair once.

    An expert without samples has no batch.
    """
    return [
        SubBatch(expert, rows_S)
        for expert in range(active_BM.shape[1])
        for rows_S in active_BM[:, expert].nonzero().squeeze(1).split(size)
        if len(rows_S)
    ]


def place(
    outputs: Iterable[tuple[SubBatch, Tensor]], num_samples: int, num_experts: int, num_classes: int
) -> Tensor:
    """Merges the logits (S, C) of batches, in any order, into (B, M, C); 0 off the routes.

    Raises:
        ValueError: logits of another shape than their batch requires.
    """
    merged_BMC = torch.zeros(num_samples, num_experts, num_classes)
    for batch, logits_SC in outputs:
        if logits_SC.shape != (len(batch.rows_S), num_classes):
            raise ValueError(
                f"expert {batch.expert}: expected ({len(batch.rows_S)}, {num_classes}) logits, got "
                f"{tuple(logits_SC.shape)}"
            )
        merged_BMC[batch.rows_S, batch.expert] = logits_SC.float()
    return merged_BMC
