"""Evaluation of one episode with all arms: the selected layers, their controls and the oracle.

Section "Controls and baselines" of the notes on Lee et al., arXiv:2111.10937.

Shape suffixes: L = layers, E = items of an episode (support first), S = support, Q = queries,
I = candidate sets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from dist_tl.methods.layer_search.classifiers import (
    ClassifierConfig,
    query_item_scores,
    query_scores,
)
from dist_tl.methods.layer_search.gram import LayerSet, one_hot, set_grams
from dist_tl.methods.layer_search.search import SearchConfig, Selection, search_layers

RANDOM_SETS = 5
MAX_ORACLE_SETS = 1024


@dataclass(frozen=True)
class EpisodeScores:
    """Query accuracies of one episode.

    Attributes:
        single: accuracy of every layer alone, the penultimate last.
        all_layers: accuracy of all layers together.
        random: mean accuracy of 5 random sets of the selected size.
        selected: accuracy of the selected set.
        oracle: accuracy of the best set on the queries: a diagnostic, never a result.
    """

    single: tuple[float, ...]
    all_layers: float
    random: float
    selected: float
    oracle: float


def accuracies(
    gram_LES: Tensor,
    support_labels_S: Tensor,
    query_labels_Q: Tensor,
    sets: Sequence[LayerSet],
    classifier: ClassifierConfig,
) -> Tensor:
    """Returns the accuracy of each set on the queries, (I,) float64."""
    size = len(support_labels_S)
    y_SC = one_hot(support_labels_S, int(support_labels_S.max()) + 1)
    gram_IES = set_grams(gram_LES, sets)
    scores_IQC = query_scores(
        gram_IES[:, :size, :size], gram_IES[:, size:, :size], y_SC, classifier
    )
    return (scores_IQC.argmax(dim=2) == query_labels_Q).double().mean(dim=1)


def score_episode(
    gram_LES: Tensor,
    support_labels_S: Tensor,
    query_labels_Q: Tensor,
    selection: Selection,
    config: SearchConfig,
    *,
    rng: np.random.Generator,
) -> EpisodeScores:
    """Scores all arms of one episode, on the same items and with the same classifier."""
    num_layers = len(gram_LES)
    singles = [(layer,) for layer in range(num_layers)]
    size = len(selection.layers)
    randoms = [
        tuple(sorted(rng.choice(num_layers, size=size, replace=False).tolist()))
        for _ in range(RANDOM_SETS)
    ]
    oracle_sets = _oracle_sets(num_layers, config)
    candidates = [*singles, tuple(range(num_layers)), selection.layers, *randoms, *oracle_sets]
    scores = accuracies(
        gram_LES, support_labels_S, query_labels_Q, candidates, config.classifier
    ).tolist()
    first_random = num_layers + 2
    return EpisodeScores(
        single=tuple(scores[:num_layers]),
        all_layers=scores[num_layers],
        selected=scores[num_layers + 1],
        random=sum(scores[first_random : first_random + RANDOM_SETS]) / RANDOM_SETS,
        oracle=max(scores),
    )


def _oracle_sets(num_layers: int, config: SearchConfig) -> list[LayerSet]:
    """Returns all sets of two or more layers up to the largest cap with at most 1024 sets."""
    for cap in range(min(config.cap, num_layers), 1, -1):
        if sum(math.comb(num_layers, size) for size in range(1, cap + 1)) <= MAX_ORACLE_SETS:
            sizes = range(2, cap + 1)
            return [c for size in sizes for c in combinations(range(num_layers), size)]
    return []


class HeldOutScores:
    """Item scores for the search whose items are episodes, scored by their mean query score."""

    def __init__(
        self, episodes: Sequence[tuple[Tensor, Tensor, Tensor]], classifier: ClassifierConfig
    ) -> None:
        self._episodes, self._classifier = episodes, classifier

    def __call__(self, sets: Sequence[LayerSet]) -> Tensor:
        return torch.stack([self._score(sets, *episode) for episode in self._episodes], dim=1)

    def _score(
        self, sets: Sequence[LayerSet], gram_LES: Tensor, support_S: Tensor, query_Q: Tensor
    ) -> Tensor:
        size, ways = len(support_S), int(support_S.max()) + 1
        gram_IES = set_grams(gram_LES, sets)
        scores_IQ = query_item_scores(
            gram_IES[:, :size, :size],
            gram_IES[:, size:, :size],
            one_hot(support_S, ways),
            one_hot(query_Q, ways),
            self._classifier,
        )
        return scores_IQ.mean(dim=1)


class ViewScores:
    """Item scores for a support of one label per class: each view is tested on the others.

    Optimistic, because the views of an image are similar.

    Args:
        gram_LVV: Gram matrices of all views of all items, view after view.
        labels_S: labels of the items, equal in every view.
    """

    def __init__(
        self, gram_LVV: Tensor, labels_S: Tensor, num_views: int, classifier: ClassifierConfig
    ) -> None:
        self._gram_LVV, self._classifier = gram_LVV, classifier
        self._num_views, self._size = num_views, len(labels_S)
        self._y_SC = one_hot(labels_S, int(labels_S.max()) + 1)

    def __call__(self, sets: Sequence[LayerSet]) -> Tensor:
        gram_IVV = set_grams(self._gram_LVV, sets)
        return torch.cat([self._score(gram_IVV, view) for view in range(self._num_views)], dim=1)

    def _score(self, gram_IVV: Tensor, view: int) -> Tensor:
        held_out = torch.arange(view * self._size, (view + 1) * self._size)
        rest = torch.tensor(
            [i for i in range(gram_IVV.shape[1]) if i not in set(held_out.tolist())]
        )
        y_RC = self._y_SC.repeat(self._num_views - 1, 1)
        return query_item_scores(
            gram_IVV[:, rest][:, :, rest],
            gram_IVV[:, held_out][:, :, rest],
            y_RC,
            self._y_SC,
            self._classifier,
        )


def select_by_views(
    gram_LVV: Tensor, labels_S: Tensor, num_views: int, config: SearchConfig
) -> Selection:
    """Selects layers for a task of one label per class, from augmented views of its support.

    Raises:
        ValueError: fewer than two views, or Gram matrices of another size.
    """
    if num_views < 2 or gram_LVV.shape[1] != num_views * len(labels_S):
        raise ValueError(
            f"expected Gram matrices of {num_views} >= 2 views of {len(labels_S)} items, got "
            f"{tuple(gram_LVV.shape)}"
        )
    scores = ViewScores(gram_LVV, labels_S, num_views, config.classifier)
    return replace(search_layers(scores, len(gram_LVV), config), branch="augmented_views")


def one_shot_set(
    episodes: Sequence[tuple[Tensor, Tensor, Tensor]], config: SearchConfig
) -> LayerSet:
    """Selects layers for tasks of one label per class, from one-shot episodes of held-out classes.

    Raises:
        ValueError: no episodes.
    """
    if not episodes:
        raise ValueError("expected at least one episode of held-out classes, got none")
    num_layers = len(episodes[0][0])
    return search_layers(HeldOutScores(episodes, config.classifier), num_layers, config).layers
