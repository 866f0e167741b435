"""Maps label tuples to classes: counted in chunks, numbered once, rare ones merged or dropped.

After Kender et al., arXiv:2207.03554; the notes' section "Classes".

Shape suffixes: N = items, m = length of a label.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_tl.config import StrictModel

Label = tuple[int, ...]
DROPPED = -1


class RareConfig(StrictModel):
    """Treatment of classes that are too small to learn."""

    rare: Literal["merge_to_prefix", "drop", "keep"] = Field(
        default="merge_to_prefix",
        description="merge_to_prefix: merge rare classes that share all anchors except the last, "
        "repeatedly; drop: drop their items; keep: keep them.",
    )
    min_count: int = Field(default=20, ge=1, description="A class with fewer items is rare.")


def histogram(tuples_Nm: Tensor) -> Counter[Label]:
    """Counts each label; counts of chunks add up."""
    return Counter(tuple(row) for row in tuples_Nm.tolist())


@dataclass(frozen=True, eq=False)
class ClassTable:
    """The class of each label.

    Attributes:
        class_of: label to class number; DROPPED for dropped items.
        names: name of every class, in order: a label, or a prefix for merged items.
        sizes: number of items in each class.
        merged: number of merged items.
        dropped: number of dropped items.
    """

    class_of: Mapping[Label, int]
    names: tuple[Label, ...]
    sizes: tuple[int, ...]
    merged: int
    dropped: int

    @classmethod
    def of(cls, counts: Mapping[Label, int], config: RareConfig) -> "ClassTable":
        """Builds the table from the counts of all labels.

        Raises:
            ValueError: no labels.
        """
        if not counts:
            raise ValueError("expected at least one label, got none")
        name_of = {label: label for label in counts}
        merged = 0
        if config.rare == "merge_to_prefix":
            name_of, merged = _merge(counts, config.min_count)
        elif config.rare == "drop":
            name_of = {k: k for k, count in counts.items() if count >= config.min_count}
        totals: Counter[Label] = Counter()
        for label, name in name_of.items():
            totals[name] += counts[label]
        names = tuple(sorted(totals))
        number = {name: index for index, name in enumerate(names)}
        class_of = {
            label: number[name_of[label]] if label in name_of else DROPPED for label in counts
        }
        dropped = sum(count for label, count in counts.items() if label not in name_of)
        return cls(class_of, names, tuple(totals[name] for name in names), merged, dropped)

    def lookup(self, tuples_Nm: Tensor) -> Tensor:
        """Returns the class of each item, int64 (N,); DROPPED for dropped items.

        Raises:
            KeyError: a label is not in the table.
        """
        return torch.tensor([self.class_of[tuple(row)] for row in tuples_Nm.tolist()])

    @property
    def entropy(self) -> float:
        """Entropy of the class histogram, in nats."""
        total = sum(self.sizes)
        return -math.fsum(n / total * math.log(n / total) for n in self.sizes) + 0.0

    @property
    def largest_share(self) -> float:
        """Share of the items in the largest class."""
        return max(self.sizes) / sum(self.sizes)


def _merge(counts: Mapping[Label, int], min_count: int) -> tuple[dict[Label, Label], int]:
    """Returns the class name of each label that is not dropped, and the number of merged items."""
    name_of = {label: label for label in counts}
    length = len(next(iter(counts)))
    moved: set[Label] = set()
    for size in range(length, 0, -1):
        totals: Counter[Label] = Counter()
        for label, name in name_of.items():
            totals[name] += counts[label]
        rare = {name for name, n in totals.items() if n < min_count and len(name) == size}
        for label in [label for label, name in name_of.items() if name in rare]:
            if size == 1:
                del name_of[label]
            else:
                name_of[label] = name_of[label][:-1]
                moved.add(label)
    merged = sum(counts[label] for label in moved if label in name_of)
    return name_of, merged


def merge_counts(parts: Iterable[Counter[Label]]) -> Counter[Label]:
    """Adds the histograms of all chunks."""
    total: Counter[Label] = Counter()
    for part in parts:
        total.update(part)
    return total
