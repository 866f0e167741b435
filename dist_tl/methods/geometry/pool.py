"""Anchors as class means, and the classes of a pool's items, from features and label tuples.

Shape suffixes: N = items, D = feature width, M = anchors (one per class), m = length of a label.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dist_tl.errors import ConfigError
from dist_tl.methods.geometry.classes import DROPPED, ClassTable, RareConfig, histogram


def class_sums(features_ND: Tensor, labels_N: Tensor, num_classes: int) -> dict[str, Tensor]:
    """Returns "sums" (M, D) and "counts" (M,) of the features by class, float64."""
    one_hot_NM = torch.nn.functional.one_hot(labels_N, num_classes).double()
    sums_MD = (one_hot_NM.T @ features_ND.double()).contiguous()
    return {"sums": sums_MD, "counts": one_hot_NM.sum(dim=0)}


def class_means(chunks: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Returns the (M, D) mean features by class, from the sums of all chunks."""
    sums_MD, counts_M = (
        torch.stack([chunk[name] for chunk in chunks]).sum(dim=0) for name in ("sums", "counts")
    )
    return sums_MD / counts_M[:, None]


def class_table(name: str, tuples_Nm: Tensor, config: RareConfig) -> ClassTable:
    """Returns the classes of all label tuples.

    Raises:
        ConfigError: every class is rare; the message starts with `name`.
    """
    table = ClassTable.of(histogram(tuples_Nm), config)
    if not table.names:
        raise ConfigError(
            f"{name}: every class of the pool is rarer than rare.min_count = {config.min_count}; "
            "lower it, shorten m, or use a larger pool"
        )
    return table


def part_classes(name: str, tuples_Nm: Tensor, member_N: Tensor, config: RareConfig) -> Tensor:
    """Returns the classes of a part of the pool, int64 (N,); DROPPED for all other items.

    Raises:
        ConfigError: every class of the part is rare; the message starts with `name`.
    """
    tuples_Pm = tuples_Nm[member_N]
    classes_N = torch.full((len(tuples_Nm),), DROPPED)
    classes_N[member_N] = class_table(name, tuples_Pm, config).lookup(tuples_Pm)
    return classes_N


def kept_rows(classes_N: Tensor, rng: np.random.Generator) -> Tensor:
    """Returns the rows of all items that are not dropped, in random order, int64."""
    order = rng.permutation(len(classes_N))
    return torch.from_numpy(order[classes_N.numpy()[order] != DROPPED])
