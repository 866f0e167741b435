"""What a source says about its images before any of them is decoded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

UNLABELLED = "unlabelled"  # the one class of images without labels


@dataclass(frozen=True, eq=False)
class Listing:
    """All images of a source: names and labels now, pixels on request.

    Only the images that a job keeps are ever decoded, so `limit: 200` of a large set is quick.

    Attributes:
        names: one a image, for messages, e.g. the path of its file.
        labels: int64 [N], indices into `class_names`.
        class_names: the source's own classes, those without an image included.
        read: the image at a position, decoded whole.
    """

    names: Sequence[str]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    read: Callable[[int], Image.Image]
