"""Searches the set of layers for one task, from its support set alone.

Scores are leave-one-out means over support items; every strategy uses Gram matrices of the support
only. A guard keeps the penultimate layer unless the best set exceeds it by more than noise.

"Layer search (after ATL)", Lee et al., arXiv:2111.10937; the selection rule is our own.

Shape suffixes: L = layers, S = support items, I = candidate sets, C = classes, P = permutations.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError
from dist_tl.methods.layer_search.classifiers import (
    ClassifierConfig,
    loo_scores,
    shuffled_loo_means,
)
from dist_tl.methods.layer_search.gram import LayerSet, one_hot, set_grams

MAX_SETS = 2**16
TIE = 1e-9
BEAM_WIDTH = 4
BATCH_SETS = 512  # Gram matrices in memory at a time
ItemScores = Callable[[Sequence[LayerSet]], Tensor]  # sets -> item scores (I, items)
Branch = Literal["loo", "held_out_classes", "augmented_views", "penultimate"]


class SearchConfig(StrictModel):
    """Candidate sets, their ranking, and the margin over the penultimate layer."""

    strategy: Literal["single", "greedy", "beam", "exhaustive"] = "greedy"
    cap: int = Field(default=4, ge=1, description="Maximum number of layers in a set.")
    epsilon: float = Field(default=1e-3, ge=0, description="Minimum score gain of a greedy step.")
    margin: Literal["one_se"] | float = Field(
        default="one_se",
        description="Minimum mean gain over the penultimate layer: one standard error of the "
        "paired item differences, or a number.",
    )
    rank_by: Literal["score", "null_z"] = Field(
        default="score",
        description="Rank first layers by score, or by z-score under shuffled labels.",
    )
    permutations: int = Field(
        default=50, ge=0, description="Number of label shuffles for the width-bias calibration."
    )
    one_shot: Literal["held_out_classes", "augmented_views", "penultimate"] = Field(
        default="held_out_classes",
        description="Method for one label per class, where no item can be left out. "
        "held_out_classes: the best set on one-shot episodes of other new classes; "
        "augmented_views: leave out one of four views of each image (optimistic, because views are "
        "similar); penultimate: the head's input.",
    )
    classifier: ClassifierConfig = Field(default_factory=ClassifierConfig)


@dataclass(frozen=True)
class Selection:
    """Result of a search.

    Attributes:
        layers: the selected set, ascending.
        branch: the method that selected it.
        best: the best set before the guard.
        score: leave-one-out score of `best`; NaN if it has none.
        single_scores: score of every layer alone.
        single_z: z-score of every layer under shuffled labels; empty without permutations.
        gain, standard_error: gain of `best` over the penultimate layer, paired by item.
        adopted: whether `best` passed the guard.
        skipped: number of support items without a score.
        path: scores of the sets along a greedy search.
    """

    layers: LayerSet
    branch: Branch
    best: LayerSet
    score: float
    single_scores: tuple[float, ...] = ()
    single_z: tuple[float, ...] = ()
    gain: float = 0.0
    standard_error: float = 0.0
    adopted: bool = False
    skipped: int = 0
    path: tuple[float, ...] = ()


def count_sets(num_layers: int, config: SearchConfig) -> int:
    """Returns the number of sets in an exhaustive search."""
    cap = min(config.cap, num_layers)
    return sum(math.comb(num_layers, size) for size in range(1, cap + 1))


def check_search(num_layers: int, config: SearchConfig) -> None:
    """Checks that the search is feasible.

    Raises:
        ConfigError: an exhaustive search over more than 65,536 sets.
    """
    if config.strategy == "exhaustive" and count_sets(num_layers, config) > MAX_SETS:
        raise ConfigError(
            f"search: exhaustive over {num_layers} layers with cap {config.cap} needs "
            f"{count_sets(num_layers, config):,} sets, more than {MAX_SETS:,}; use strategy greedy "
            "or a smaller cap"
        )


class _Scorer:
    """Cached item scores of candidate sets on one support."""

    def __init__(self, scores: ItemScores, num_layers: int) -> None:
        self.num_layers = num_layers
        self._scores = scores
        self._items: dict[LayerSet, Tensor] = {}
        self._means: dict[LayerSet, float] = {}

    def items(self, layers: LayerSet) -> Tensor:
        """Returns the scores of the items that have one, float64."""
        self.prepare([layers])
        return self._items[layers]

    def mean(self, layers: LayerSet) -> float:
        self.prepare([layers])
        return self._means[layers]

    def prepare(self, sets: Sequence[LayerSet]) -> None:
        missing = [layers for layers in sets if layers not in self._items]
        for first in range(0, len(missing), BATCH_SETS):
            batch = missing[first : first + BATCH_SETS]
            rows = self._scores(batch)
            self._items.update(zip(batch, rows, strict=True))
            self._means.update(zip(batch, rows.mean(dim=1).tolist(), strict=True))

    def best(self, sets: Sequence[LayerSet]) -> LayerSet:
        """Returns the set with the highest mean; ties (1e-9) go to the smaller, then deeper set."""
        self.prepare(sets)
        top = max(self._means[layers] for layers in sets)
        tied = [layers for layers in sets if self._means[layers] >= top - TIE]
        return min(tied, key=lambda layers: (len(layers), tuple(-layer for layer in layers[::-1])))


def search_layers(
    scores: ItemScores, num_layers: int, config: SearchConfig, *, first: int | None = None
) -> Selection:
    """Returns the best set by the given item scores, after the guard.

    Args:
        scores: item scores of candidate sets, (I, items) float64; higher is better.
        first: the first layer of a greedy search; further layers are selected by score.

    Raises:
        ConfigError: too many sets.
    """
    check_search(num_layers, config)
    scorer = _Scorer(scores, num_layers)
    if first is None:
        best, path = _STRATEGIES[config.strategy](scorer, config)
    else:
        cap = 1 if config.strategy == "single" else config.cap
        best, path = _grow(scorer, (first,), cap, config.epsilon)
    return _guarded(scorer, best, path, config)


def _guarded(
    scorer: _Scorer, best: LayerSet, path: Sequence[float], config: SearchConfig
) -> Selection:
    """Selects `best` if it exceeds the penultimate layer by more than the margin."""
    last = (scorer.num_layers - 1,)
    difference = scorer.items(best) - scorer.items(last)
    count = len(difference)
    error = float(difference.std(correction=1)) / math.sqrt(count) if count > 1 else math.inf
    margin = error if config.margin == "one_se" else float(config.margin)
    gain = float(difference.mean())
    adopted = best != last and gain > margin
    return Selection(
        layers=best if adopted else last,
        branch="loo",
        best=best,
        score=scorer.mean(best),
        single_scores=tuple(scorer.mean((layer,)) for layer in range(scorer.num_layers)),
        gain=gain,
        standard_error=error,
        adopted=adopted,
        path=tuple(path),
    )


def _single(scorer: _Scorer, config: SearchConfig) -> tuple[LayerSet, list[float]]:
    best = scorer.best([(layer,) for layer in range(scorer.num_layers)])
    return best, [scorer.mean(best)]


def _greedy(scorer: _Scorer, config: SearchConfig) -> tuple[LayerSet, list[float]]:
    return _grow(scorer, _single(scorer, config)[0], config.cap, config.epsilon)


def _grow(
    scorer: _Scorer, layers: LayerSet, cap: int, epsilon: float
) -> tuple[LayerSet, list[float]]:
    path = [scorer.mean(layers)]
    while len(layers) < min(cap, scorer.num_layers):
        larger = scorer.best(_grown(layers, scorer.num_layers))
        if scorer.mean(larger) <= path[-1] + epsilon:
            break
        layers = larger
        path.append(scorer.mean(layers))
    return layers, path


def _grown(layers: LayerSet, num_layers: int) -> list[LayerSet]:
    rest = (layer for layer in range(num_layers) if layer not in layers)
    return [tuple(sorted((*layers, layer))) for layer in rest]


def _beam(scorer: _Scorer, config: SearchConfig) -> tuple[LayerSet, list[float]]:
    # One slot follows the greedy path, so that a beam is never worse than greedy.
    greedy = scorer.best([(layer,) for layer in range(scorer.num_layers)])
    beam: list[LayerSet] = [(layer,) for layer in range(scorer.num_layers)]
    seen = set(beam)
    for _ in range(1, min(config.cap, scorer.num_layers)):
        beam = [*_leading(scorer, beam, BEAM_WIDTH - 1), greedy]
        beam = sorted({s for layers in beam for s in _grown(layers, scorer.num_layers)})
        greedy = scorer.best(_grown(greedy, scorer.num_layers))
        seen.update(beam)
    best = scorer.best(sorted(seen))
    return best, [scorer.mean(best)]


def _leading(scorer: _Scorer, sets: Sequence[LayerSet], count: int) -> list[LayerSet]:
    remaining, leading = list(sets), []
    while remaining and len(leading) < count:
        leading.append(scorer.best(remaining))
        remaining.remove(leading[-1])
    return leading


def _exhaustive(scorer: _Scorer, config: SearchConfig) -> tuple[LayerSet, list[float]]:
    sizes = range(1, min(config.cap, scorer.num_layers) + 1)
    layers = range(scorer.num_layers)
    best = scorer.best([chosen for size in sizes for chosen in combinations(layers, size)])
    return best, [scorer.mean(best)]


_STRATEGIES = {
    "single": _single,
    "greedy": _greedy,
    "beam": _beam,
    "exhaustive": _exhaustive,
}


def select_layers(
    gram_LSS: Tensor,
    labels_S: Tensor,
    config: SearchConfig,
    *,
    rng: np.random.Generator,
    fixed: LayerSet | None = None,
) -> Selection:
    """Selects the layers for one task, from its support alone.

    Args:
        gram_LSS: Gram matrices of the support, float64.
        labels_S: int64 labels 0 to C - 1, every class at least once.
        rng: shuffles labels for the calibration.
        fixed: the set selected on held-out classes, for tasks of one label per class.

    Raises:
        ValueError: fewer than two classes, or a class without an item.
        ConfigError: too many sets.
    """
    num_layers, num_classes = len(gram_LSS), int(labels_S.max()) + 1
    y_SC = one_hot(labels_S, num_classes)
    last = (num_layers - 1,)
    if num_layers == 1:
        return Selection(last, "penultimate", last, math.nan)
    if float(y_SC.sum(dim=0).max()) < 2:
        return _one_shot(config, fixed, last)
    scored_S = ~(y_SC @ y_SC.sum(dim=0) == 1)

    def scores(sets: Sequence[LayerSet]) -> Tensor:
        return loo_scores(set_grams(gram_LSS, sets), y_SC, config.classifier)[:, scored_S]

    z = null_z(gram_LSS, y_SC, config, rng) if config.permutations else ()
    first = int(np.argmax(z)) if config.rank_by == "null_z" and z else None
    selection = search_layers(scores, num_layers, config, first=first)
    return dataclasses.replace(selection, single_z=z, skipped=int((~scored_S).sum()))


def _one_shot(config: SearchConfig, fixed: LayerSet | None, last: LayerSet) -> Selection:
    """Selects the fixed set, or the penultimate layer, for a task of one label per class."""
    if config.one_shot != "penultimate" and fixed is not None:
        return Selection(fixed, config.one_shot, fixed, math.nan, adopted=fixed != last)
    return Selection(last, "penultimate", last, math.nan)


def null_z(
    gram_LSS: Tensor, y_SC: Tensor, config: SearchConfig, rng: np.random.Generator
) -> tuple[float, ...]:
    """Returns the z-score of each layer relative to its scores under shuffled labels.

    Wide layers score higher by chance alone; z-scores are comparable between layers.
    """
    y_PSC = torch.stack([y_SC[_shuffled(y_SC, rng)] for _ in range(config.permutations)])
    null_PL = shuffled_loo_means(gram_LSS, y_PSC, config.classifier)
    true_L = shuffled_loo_means(gram_LSS, y_SC[None], config.classifier)[0]
    spread_L = null_PL.std(dim=0, correction=0).clamp_min(1e-6)
    return tuple(((true_L - null_PL.mean(dim=0)) / spread_L).tolist())


def _shuffled(y_SC: Tensor, rng: np.random.Generator) -> Tensor:
    """Returns a permutation that changes the partition of the items into classes."""
    same_SS = y_SC @ y_SC.T
    for _ in range(100):
        order = torch.from_numpy(rng.permutation(len(y_SC)))
        if not torch.equal(same_SS[order][:, order], same_SS):
            return order
    return torch.from_numpy(rng.permutation(len(y_SC)))  # too few items for another partition
