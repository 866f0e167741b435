"""Seeded random generators, each derived from (run seed, purpose, index).

dist_tl never uses global generators. Independent draws differ in purpose or index, so results do
not depend on timing or the number of workers.
"""

import hashlib
import operator
from collections.abc import Iterable
from typing import SupportsIndex

import numpy as np
import torch


def derive_seed(run_seed: SupportsIndex, purpose: str, *index: SupportsIndex) -> int:
    """Returns a 63-bit seed that depends on the arguments only.

    Args:
        run_seed: the job's seed.
        purpose: purpose of the draws, e.g. "pseudo noise"; different purposes are independent.
        index: any number of integers, e.g. an epoch and a lane.
    """
    # `operator.index` rejects 1.5, which `int` would silently truncate to 1.
    numbers = [str(operator.index(i)) for i in (run_seed, *index)]
    # Lengths and separators distinguish ("ab", 1) from ("a", 11), for any content of `purpose`.
    text = f"{numbers[0]}|{len(purpose)}:{purpose}|{','.join(numbers[1:])}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_rng(run_seed: SupportsIndex, purpose: str, *index: SupportsIndex) -> torch.Generator:
    """Returns a CPU torch generator seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(run_seed, purpose, *index))


def numpy_rng(run_seed: SupportsIndex, purpose: str, *index: SupportsIndex) -> np.random.Generator:
    """Returns a numpy generator (PCG64) seeded by :func:`derive_seed`."""
    return np.random.default_rng(derive_seed(run_seed, purpose, *index))


def row_rngs(run_seed: SupportsIndex, purpose: str, rows: Iterable[int]) -> list[torch.Generator]:
    """Returns one generator per row, so that a sample's draws do not depend on its batch."""
    return [torch_rng(run_seed, purpose, row) for row in rows]
