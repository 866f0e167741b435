"""Gram matrices of layers and of sets of layers; their cost does not depend on the layers' width.

A set's features are the concatenated features of its layers over sqrt(|I|), so its Gram matrix is
the mean of theirs.

After Lee et al., arXiv:2111.10937; section "Sets" of the notes.

Shape suffixes: L = layers, E = items of an episode, S = support items, I = candidate sets.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LayerSet = tuple[int, ...]


def layer_grams(phis: Sequence[Tensor], items_E: Tensor, num_support: int | None = None) -> Tensor:
    """Returns inner products of all items of an episode with its support, (L, E, S) float64.

    Args:
        phis: one (N, D) tensor per layer.
        items_E: int64 row indices of the episode, support first.
        num_support: S; None: all items.
    """
    rows = [phi_ND.index_select(0, items_E).double() for phi_ND in phis]
    return torch.stack([row_ED @ row_ED[:num_support].T for row_ED in rows])


def set_grams(grams_LES: Tensor, sets: Sequence[LayerSet]) -> Tensor:
    """Returns the Gram matrix of every set, the mean over its layers, (I, E, S)."""
    weight_IL = grams_LES.new_zeros(len(sets), len(grams_LES))
    for row, layers in enumerate(sets):
        weight_IL[row, list(layers)] = 1 / len(layers)
    return (weight_IL @ grams_LES.flatten(1)).view(-1, *grams_LES.shape[1:])


def one_hot(labels_S: Tensor, num_classes: int) -> Tensor:
    """Returns one-hot labels (S, C), float64.

    Raises:
        ValueError: fewer than two classes, or a class without an item.
    """
    y_SC = torch.nn.functional.one_hot(labels_S.long(), num_classes).double()
    if num_classes < 2 or bool((y_SC.sum(dim=0) == 0).any()):
        raise ValueError(
            f"expected {max(num_classes, 2)} classes with at least one support item each, got "
            f"{torch.bincount(labels_S.long(), minlength=num_classes).tolist()}"
        )
    return y_SC
