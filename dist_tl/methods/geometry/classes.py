"""From label tuples to classes: counted in chunks, numbered once, rare ones pooled or dropped.

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
    """What becomes of classes that are too small to learn."""

    rare: Literal["merge_to_prefix", "drop", "keep"] = Field(
        default="merge_to_prefix",
        description="merge_to_prefix: pool rare classes that share all anchors but the last, again "
        "and again; drop: leave their items out; keep: as they are.",
    )
    min_count: int = Field(default=20, ge=1, description="A class of fewer items is rare.")


def histogram(tuples_Nm: Tensor) -> Counter[Label]:
    """How often each label occurs; counts of chunks add up."""
    return Counter(tuple(row) for row in tuples_Nm.tolist())


@dataclass(frozen=True, eq=False)
class ClassTable:
    """Which class each label belongs to.

    Attributes:
        class_of: label to class number; DROPPED for items that are left out.
        names: of every class, in order: a label, or a prefix, which holds pooled items only.
        sizes: items in each class.
    """

    class_of: Mapping[Label, int]
    names: tuple[Label, ...]
    sizes: tuple[int, ...]
    merged: int
    dropped: int

    @classmethod
    def of(cls, counts: Mapping[Label, int], config: RareConfig) -> "ClassTable":
        """The table of all items' labels.

        Raises:
            ValueError: no labels.
        """
        if not counts:
            raise ValueError("expected at least one label, got none")
        place = {label: label for label in counts}
        merged = 0
        if config.rare == "merge_to_prefix":
            place, merged = _merge(counts, config.min_count)
        elif config.rare == "drop":
            place = {k: k for k, count in counts.items() if count >= config.min_count}
        totals: Counter[Label] = Counter()
        for label, name in place.items():
            totals[name] += counts[label]
        names = tuple(sorted(totals))
        number = {name: index for index, name in enumerate(names)}
        class_of = {label: number[place[label]] if label in place else DROPPED for label in counts}
        dropped = sum(count for label, count in counts.items() if label not in place)
        return cls(class_of, names, tuple(totals[name] for name in names), merged, dropped)

    def lookup(self, tuples_Nm: Tensor) -> Tensor:
        """The class of each item, int64 (N,); DROPPED for items that are left out.

        Raises:
            KeyError: a label that was not counted.
        """
        return torch.tensor([self.class_of[tuple(row)] for row in tuples_Nm.tolist()])

    @property
    def entropy(self) -> float:
        """Of the class histogram, in nats."""
        total = sum(self.sizes)
        return -math.fsum(n / total * math.log(n / total) for n in self.sizes) + 0.0

    @property
    def largest_share(self) -> float:
        """Of the items, in the largest class."""
        return max(self.sizes) / sum(self.sizes)


def _merge(counts: Mapping[Label, int], min_count: int) -> tuple[dict[Label, Label], int]:
    """Where each label goes; labels that are rare even as a single anchor go nowhere."""
    place = {label: label for label in counts}
    length = len(next(iter(counts)))
    moved: set[Label] = set()
    for size in range(length, 0, -1):
        totals: Counter[Label] = Counter()
        for label, name in place.items():
            totals[name] += counts[label]
        rare = {name for name, n in totals.items() if n < min_count and len(name) == size}
        for label in [label for label, name in place.items() if name in rare]:
            if size == 1:
                del place[label]
            else:
                place[label] = place[label][:-1]
                moved.add(label)
    kept = sum(counts[label] for label in moved if label in place)
    return place, kept


def merge_counts(parts: Iterable[Counter[Label]]) -> Counter[Label]:
    """The histogram of all chunks."""
    total: Counter[Label] = Counter()
    for part in parts:
        total.update(part)
    return total
