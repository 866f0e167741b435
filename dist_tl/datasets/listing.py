"""Listing of a source's images, before any of them is decoded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    """

    names: Sequence[str]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    read: Callable[[int], Image.Image]
