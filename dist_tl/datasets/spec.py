"""What a job says about labelled data, and loading it into memory.

Sources: `digits` (nothing to download), `folder` (one sub-folder a class), `wds` (local tars).
Not covered: URLs. Stores belong to `dist_tl.storage`; labelled target sets are small, so they are
read from a local path, a mounted bucket included.
"""

from collections.abc import Iterable
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dist_tl.datasets.decode import as_array
from dist_tl.datasets.digits import DigitsConfig, list_digits
from dist_tl.datasets.folder import FolderConfig, list_folder
from dist_tl.datasets.images import LabelledImages
from dist_tl.datasets.listing import Listing
from dist_tl.datasets.selection import select
from dist_tl.datasets.tars import WdsConfig, list_tars
from dist_tl.errors import ConfigError

DataConfig = Annotated[DigitsConfig | FolderConfig | WdsConfig, Field(discriminator="source")]


def load_images(config: DataConfig, *, seed: int = 0) -> LabelledImages:
    """The images that a job names, decoded, in the order of the source.

    Args:
        seed: fixes which images `limit` keeps, and nothing else. The arms and repeats of a job
            pass the same one, so that they share their data.

    Raises:
        ConfigError: the job asks for what the source cannot give; the message says what to change.
        DataError: the source exists but is damaged; the message names the file or class.
    """
    listing = _list(config)
    chosen = select(listing, config, seed=seed)
    images = (
        (listing.names[i], as_array(listing.read(i), size=config.size, channels=config.channels))
        for i in chosen.indices
    )
    return LabelledImages(_stack(images, len(chosen.indices)), chosen.labels, chosen.class_names)


def _list(config: DataConfig) -> Listing:
    match config:
        case DigitsConfig():
            return list_digits()
        case FolderConfig():
            return list_folder(config)
        case WdsConfig():
            return list_tars(config)


def _stack(images: Iterable[tuple[str, NDArray[np.uint8]]], num_images: int) -> NDArray[np.uint8]:
    stacked: NDArray[np.uint8] | None = None
    for i, (name, image) in enumerate(images):
        if stacked is None:
            first, shape = name, image.shape
            stacked = np.empty((num_images, *shape), dtype=np.uint8)
        if image.shape != shape:
            raise ConfigError(_difference(first, shape, name, image.shape))
        stacked[i] = image
    assert stacked is not None, "a selection holds at least one image of every class"
    return stacked


def _difference(
    first: str, shape: tuple[int, ...], other: str, other_shape: tuple[int, ...]
) -> str:
    if shape[2] != other_shape[2]:
        return (
            f"{first} has {shape[2]} channel(s) and {other} has {other_shape[2]}; "
            "add channels: 1 or channels: 3"
        )
    return (
        f"{first} has {shape[1]} x {shape[0]} pixels and {other} has {other_shape[1]} x "
        f"{other_shape[0]}; add size:, e.g. size: {min(*shape[:2], *other_shape[:2])}"
    )
