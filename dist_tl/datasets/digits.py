"""scikit-learn's handwritten digits: 1797 gray images of 8x8 pixels, no download required."""

from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from dist_tl.datasets.listing import Listing
from dist_tl.datasets.selection import SourceConfig
from dist_tl.datasets.views import ViewsConfig


class DigitsConfig(SourceConfig):
    """The digits 0 to 9; class names are "0" to "9"."""

    source: Literal["digits"] = "digits"
    views: ViewsConfig = Field(
        default=ViewsConfig(kind="digits"), description="Data augmentation in training."
    )


def list_digits() -> Listing:
    """Returns all 1797 digits, with levels 0..16 scaled to 0..255 and rounded."""
    # Imported lazily: the import takes a second, and `dist-tl plan` of other data does not need it.
    from sklearn.datasets import load_digits
    from sklearn.utils import Bunch

    digits = load_digits()
    assert isinstance(digits, Bunch)
    images = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)
    return Listing(
        names=[f"digit {i}" for i in range(len(images))],
        labels=digits.target.astype(np.int64),
        class_names=tuple(str(name) for name in range(10)),
        read=lambda i: Image.fromarray(images[i]),
    )
