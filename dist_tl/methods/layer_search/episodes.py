"""Few-shot episodes: which items of a data set play support and query, by index alone.

Section "Controls and baselines" of the notes on Lee et al., arXiv:2111.10937.

Shape suffixes: N = items of the data set, S = support items, Q = queries.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError
from dist_tl.seeds import numpy_rng

Indices = NDArray[np.int64]


class EpisodesConfig(StrictModel):
    """How many small tasks are drawn, and how small."""

    ways: int = Field(default=5, ge=2, description="Classes of an episode.")
    shots: tuple[int, ...] = Field(
        default=(1, 2, 5, 10),
        min_length=1,
        description="Support items a class; one series of each.",
    )
    queries: int = Field(default=15, ge=1, description="Queries a class.")
    count: int = Field(default=600, ge=1, description="Episodes of each number of shots.")


@dataclass(frozen=True, eq=False)
class Episode:
    """One task: rows of the data set and their labels 0 to ways - 1, support apart from queries."""

    support_S: Indices
    support_labels_S: Indices
    query_Q: Indices
    query_labels_Q: Indices


def check_classes(labels_N: Indices, config: EpisodesConfig) -> None:
    """Refuse episodes that the data cannot give.

    Raises:
        ConfigError: too few classes, or a class with too few items.
    """
    counts = np.bincount(labels_N)
    needed = max(config.shots) + config.queries
    if (counts > 0).sum() < config.ways:
        raise ConfigError(
            f"episodes: {config.ways} ways need as many classes, the data has {(counts > 0).sum()}"
        )
    if min(config.shots) < 1:
        raise ConfigError(f"episodes: expected 1 shot or more, got {min(config.shots)}")
    short = [int(c) for c in np.flatnonzero((counts > 0) & (counts < needed))]
    if short:
        raise ConfigError(
            f"episodes: {max(config.shots)} shots and {config.queries} queries need {needed} items "
            f"a class; class {short[0]} has {counts[short[0]]}. Ask for fewer shots or queries"
        )


def draw_episode(
    labels_N: Indices, config: EpisodesConfig, shots: int, *, seed: int, index: int
) -> Episode:
    """Episode `index`: a pure function of its arguments.

    The same index with more shots has the same classes and queries, and the same first support
    items, so that curves over shots are paired.
    """
    rng = numpy_rng(seed, "episode", index)
    present = np.flatnonzero(np.bincount(labels_N))
    classes = rng.choice(present, size=config.ways, replace=False)
    support, query = [], []
    for label in classes:
        items = rng.permutation(np.flatnonzero(labels_N == label))
        query.append(items[: config.queries])
        support.append(items[config.queries : config.queries + shots])
    own = np.arange(config.ways)
    return Episode(
        support_S=np.concatenate(support),
        support_labels_S=np.repeat(own, shots),
        query_Q=np.concatenate(query),
        query_labels_Q=np.repeat(own, config.queries),
    )
