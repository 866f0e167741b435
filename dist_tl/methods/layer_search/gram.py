"""Gram matrices of layers, and of sets of layers: after these the width of a layer costs nothing.

A set's features are its layers' side by side over sqrt(|I|), so its Gram matrix is their mean.

After Lee et al., arXiv:2111.10937; section "Sets" of the notes.

Shape suffixes: L = layers, E = items of an episode, S = support items, I = candidate sets.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LayerSet = tuple[int, ...]


def layer_grams(phis: Sequence[Tensor], items_E: Tensor, num_support: int | None = None) -> Tensor:
    """(L, E, S) float64 inner products of all items of an episode with its support.

    Args:
        phis: a (N, D) tensor a layer.
        items_E: int64 rows of the episode, support first.
        num_support: S; absent: all items are.
    """
    rows = [phi_ND.index_select(0, items_E).double() for phi_ND in phis]
    return torch.stack([row_ED @ row_ED[:num_support].T for row_ED in rows])


def set_grams(grams_LES: Tensor, sets: Sequence[LayerSet]) -> Tensor:
    """(I, E, S): for every set the mean over its layers."""
    weight_IL = grams_LES.new_zeros(len(sets), len(grams_LES))
    for row, layers in enumerate(sets):
        weight_IL[row, list(layers)] = 1 / len(layers)
    return (weight_IL @ grams_LES.flatten(1)).view(-1, *grams_LES.shape[1:])


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
