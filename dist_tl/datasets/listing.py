"""Listing of a source's images, before any of them is decoded."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

UNLABELLED = "unlabelled"  # the only class of images without labels


@dataclass(frozen=True, eq=False)
class Listing:
    """All images of a source: names and labels, with lazy decoding.

    Only the images that a job keeps are decoded, so `limit: 200` of a large set is fast.

    Attributes:
        names: one name per image for messages, e.g. the path of its file.
        labels: int64 [N], indices into `class_names`.
        class_names: all classes of the source, including classes without images.
        read: decodes the image at a position.
        passed_over: number of files that are not read, by suffix; hidden files are not counted.
    """

    names: Sequence[str]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    read: Callable[[int], Image.Image]
    passed_over: Mapping[str, int] = field(default_factory=dict)


def count_suffixes(names: Iterable[PurePath | str]) -> dict[str, int]:
    """Returns the number of files by lower-case suffix, e.g. {".txt": 3}, most frequent first."""
    counts = Counter(PurePath(name).suffix.lower() or "without suffix" for name in names)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
