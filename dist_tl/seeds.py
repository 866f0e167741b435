"""Seeded random generators, each derived from (run seed, purpose, index).

Nothing in dist_tl draws from a global generator. Two draws that must not agree differ in purpose
or index, so neither timing nor the number of workers can change what is drawn.
"""

import hashlib
import operator
from collections.abc import Iterable

import numpy as np
import torch


def derive_seed(run_seed: int, purpose: str, *index: int) -> int:
    """A 63-bit seed that follows from its arguments alone.

    Args:
        run_seed: the job's seed.
        purpose: what the draws are for, e.g. "pseudo noise"; different purposes are independent.
        index: any number of integers, e.g. an epoch and a lane.
    """
    # `operator.index` refuses 1.5, which `int` would quietly make the same as 1.
    numbers = [str(operator.index(i)) for i in (run_seed, *index)]
    # Lengths and separators keep ("ab", 1) and ("a", 11) apart, whatever the purpose holds.
    text = f"{numbers[0]}|{len(purpose)}:{purpose}|{','.join(numbers[1:])}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_rng(run_seed: int, purpose: str, *index: int) -> torch.Generator:
    """A CPU torch generator seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(run_seed, purpose, *index))


def numpy_rng(run_seed: int, purpose: str, *index: int) -> np.random.Generator:
    """A numpy generator (PCG64) seeded by :func:`derive_seed`."""
    return np.random.default_rng(derive_seed(run_seed, purpose, *index))


def row_rngs(run_seed: int, purpose: str, rows: Iterable[int]) -> list[torch.Generator]:
    """One generator a row, so that a sample's draws do not depend on which batch it sits in."""
    return [torch_rng(run_seed, purpose, row) for row in rows]
