"""Gram matrices of layers, and of sets of layers: after these the width of a layer costs nothing.

A set's features are its layers' side by side over sqrt(|I|), so its Gram matrix is their mean.

After Lee et al., arXiv:2111.10937; section "Sets" of the notes.

Shape suffixes: L = layers, E = items of an episode, S = support items, I = candidate sets.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LayerSet = tuple[int, ...]


def layer_grams(phis: Sequence[Tensor], items_E: Tensor) -> Tensor:
    """(L, E, E) float64 inner products of the chosen items' unit vectors.

    Args:
        phis: a (N, D) tensor a layer.
        items_E: int64 rows of the episode, support first.
    """
    rows = [phi_ND[items_E].double() for phi_ND in phis]
    return torch.stack([row_ED @ row_ED.T for row_ED in rows])


def set_grams(grams_LEE: Tensor, sets: Sequence[LayerSet]) -> Tensor:
    """(I, E, E): for every set the mean over its layers."""
    return torch.stack([grams_LEE[list(layers)].mean(dim=0) for layers in sets])


def one_hot(labels_S: Tensor, num_classes: int) -> Tensor:
    """(S, C) float64.

    Raises:
        ValueError: fewer than two classes, or one without an item.
    """
    y_SC = torch.nn.functional.one_hot(labels_S.long(), num_classes).double()
    if num_classes < 2 or bool((y_SC.sum(dim=0) == 0).any()):
        raise ValueError(
            f"expected {max(num_classes, 2)} classes with one support item each at least, got "
            f"{torch.bincount(labels_S.long(), minlength=num_classes).tolist()}"
        )
    return y_SC
