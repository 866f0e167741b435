"""Which samples go to which expert, in batches of a size it can digest, and back into their places.

Shape suffixes: B = samples, M = experts, C = target classes, S = samples of one batch.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class SubBatch(NamedTuple):
    """Samples of one expert.

    Attributes:
        expert: its index in the hub.
        rows_S: int64, which samples, ascending.
    """

    expert: int
    rows_S: Tensor


def sub_batches(active_BM: Tensor, size: int) -> list[SubBatch]:
    """Every (sample, expert) pair of the routes exactly once, at most `size` samples a batch.

    An expert that no sample chose gets none.
    """
    return [
        SubBatch(expert, rows_S)
        for expert in range(active_BM.shape[1])
        for rows_S in active_BM[:, expert].nonzero().squeeze(1).split(size)
        if len(rows_S)
    ]


def place(
    answers: Iterable[tuple[SubBatch, Tensor]], num_samples: int, num_experts: int, num_classes: int
) -> Tensor:
    """Answers (S, C), in whatever order they come, in their places: (B, M, C), 0 elsewhere.

    Raises:
        ValueError: an answer has another shape than its batch.
    """
    placed_BMC = torch.zeros(num_samples, num_experts, num_classes)
    for batch, logits_SC in answers:
        if logits_SC.shape != (len(batch.rows_S), num_classes):
            raise ValueError(
                f"expert {batch.expert}: expected ({len(batch.rows_S)}, {num_classes}) logits, got "
                f"{tuple(logits_SC.shape)}"
            )
        placed_BMC[batch.rows_S, batch.expert] = logits_SC.float()
    return placed_BMC
