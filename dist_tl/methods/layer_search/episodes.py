"""Few-shot episodes: indices of support and query items in a data set.

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
    """Number and size of the few-shot tasks."""

    ways: int = Field(default=5, ge=2, description="Classes per episode.")
    shots: tuple[int, ...] = Field(
        default=(1, 2, 5, 10),
        min_length=1,
        description="Support items per class; one series of episodes for each value.",
    )
    queries: int = Field(default=15, ge=1, description="Queries per class.")
    count: int = Field(default=600, ge=1, description="Episodes for each number of shots.")


@dataclass(frozen=True, eq=False)
class Episode:
    """One task: row indices and labels 0 to ways - 1 of disjoint support and query sets."""

    support_S: Indices
    support_labels_S: Indices
    query_Q: Indices
    query_labels_Q: Indices


def check_classes(labels_N: Indices, config: EpisodesConfig) -> None:
    """Checks that the data set is large enough for the episodes.

    Raises:
        ConfigError: too few classes, or a class with too few items.
    """
    counts = np.bincount(labels_N)
    needed = max(config.shots) + config.queries
    if (counts > 0).sum() < config.ways:
        raise ConfigError(
            f"episodes: expected at least {config.ways} classes for {config.ways} ways, got "
            f"{(counts > 0).sum()}"
        )
    if min(config.shots) < 1:
        raise ConfigError(f"episodes: expected at least 1 shot, got {min(config.shots)}")
    too_small = [int(c) for c in np.flatnonzero((counts > 0) & (counts < needed))]
    if too_small:
        raise ConfigError(
            f"episodes: {max(config.shots)} shots and {config.queries} queries need {needed} items "
            f"per class, class {too_small[0]} has {counts[too_small[0]]}; lower shots or queries"
        )


def draw_episode(
    labels_N: Indices, config: EpisodesConfig, shots: int, *, seed: int, index: int
) -> Episode:
    """Draws episode `index`, which depends on the arguments only.

    More shots keep the classes, the queries and the first support items of the same index, so that
    curves over shots are paired.
    """
    rng = numpy_rng(seed, "episode", index)
    present = np.flatnonzero(np.bincount(labels_N))
    classes = rng.choice(present, size=config.ways, replace=False)
    support, query = [], []
    for label in classes:
        items = rng.permutation(np.flatnonzero(labels_N == label))
        query.append(items[: config.queries])
        support.append(items[config.queries : config.queries + shots])
    labels = np.arange(config.ways)
    return Episode(
        support_S=np.concatenate(support),
        support_labels_S=np.repeat(labels, shots),
        query_Q=np.concatenate(query),
        query_labels_Q=np.repeat(labels, config.queries),
    )
