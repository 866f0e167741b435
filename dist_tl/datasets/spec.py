"""Configuration of labelled data, and loading it into memory.

Sources: `digits` (no download), `folder` (one sub-folder per class), `wds` (local tars), and
`mixture` of these, which records the domain of each image.
Not covered: URLs. Labelled target sets are small, so they are read from local paths, including
mounted buckets; object stores belong to `dist_tl.storage`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dist_tl.config import StrictModel
from dist_tl.contents import split_pin
from dist_tl.datasets.decode import as_array
from dist_tl.datasets.digits import DigitsConfig, list_digits
from dist_tl.datasets.domains import change_domain
from dist_tl.datasets.folder import FolderConfig, list_folder
from dist_tl.datasets.images import LabelledImages
from dist_tl.datasets.listing import Listing
from dist_tl.datasets.selection import select
from dist_tl.datasets.tars import WdsConfig, list_tars
from dist_tl.datasets.views import ViewsConfig
from dist_tl.errors import ConfigError

OneSource = Annotated[DigitsConfig | FolderConfig | WdsConfig, Field(discriminator="source")]


class MixtureConfig(StrictModel):
    """Several data sets with the same classes; each one is a domain."""

    source: Literal["mixture"]
    domains: dict[str, OneSource] = Field(min_length=1, description="Domain name -> data source.")
    views: ViewsConfig = Field(
        default=ViewsConfig(kind="natural"), description="Data augmentation in training."
    )


DataConfig = Annotated[
    DigitsConfig | FolderConfig | WdsConfig | MixtureConfig, Field(discriminator="source")
]


def load_images(config: DataConfig, *, seed: int = 0) -> LabelledImages:
    """Loads and decodes the images of a job, in the order of the source.

    Args:
        seed: determines which images `limit` keeps, and nothing else. All arms and repeats of a
            job use the same seed, so that they share their data.

    Raises:
        ConfigError: the options do not match the source; the message says what to change.
        DataError: the source exists but is damaged; the message names the file or class.
    """
    if isinstance(config, MixtureConfig):
        return _mixture(config, seed)
    listing = _list(config)
    chosen = select(listing, config, seed=seed)
    positions: list[int] = chosen.indices.tolist()
    images = (
        (listing.names[i], as_array(listing.read(i), size=config.size, channels=config.channels))
        for i in positions
    )
    stacked = _stack(images, len(positions))
    if config.domain is not None:
        stacked = change_domain(stacked, config.domain, numbers=positions)
    return LabelledImages(
        stacked,
        chosen.labels,
        chosen.class_names,
        names=[listing.names[i] for i in positions],
        passed_over=listing.passed_over,
    )


def selected_rows(config: DataConfig) -> frozenset[tuple[str, int]]:
    """Returns (content of the source, position in it) of each image that a job keeps.

    Two configurations of one source share an image if and only if they share a row, whatever they
    do to its pixels. Of a pinned source, the content counts, not its path.
    """
    if isinstance(config, MixtureConfig):
        return frozenset().union(*map(selected_rows, config.domains.values()))
    places = config.named_files() if not isinstance(config, DigitsConfig) else [config.source]
    source = " ".join(split_pin(place)[1] or place for place in places)
    chosen = select(_list(config), config, seed=0)
    return frozenset((source, position) for position in chosen.indices.tolist())


def _mixture(config: MixtureConfig, seed: int) -> LabelledImages:
    # Sorted, like the keys in a job's fingerprint: the images must not depend on their order.
    parts = {name: load_images(config.domains[name], seed=seed) for name in sorted(config.domains)}
    first_name, first = next(iter(parts.items()))
    for name, part in parts.items():
        if part.class_names != first.class_names:
            raise ConfigError(f"mixture: domains {first_name} and {name} have different classes")
        if part.image_shape != first.image_shape:
            raise ConfigError(
                f"mixture: images of {first_name} are (channels, height, width) "
                f"{first.image_shape}, those of {name} {part.image_shape}; set size and channels"
            )
    return LabelledImages(
        np.concatenate([part.images for part in parts.values()]),
        np.concatenate([part.labels for part in parts.values()]),
        first.class_names,
        domains=np.repeat(np.arange(len(parts)), [len(part) for part in parts.values()]),
        domain_names=tuple(parts),
        names=[name for part in parts.values() for name in part.names],
        passed_over=_passed_over(config, parts),
    )


def _passed_over(config: MixtureConfig, parts: Mapping[str, LabelledImages]) -> dict[str, int]:
    """Returns the files passed over in all domains; domains of one place are counted once."""
    places = {
        str(getattr(config.domains[name], "path", "")): part.passed_over
        for name, part in parts.items()
    }
    total: Counter[str] = Counter()
    for counts in places.values():
        total.update(counts)
    return dict(total.most_common())


def _list(config: OneSource) -> Listing:
    match config:
        case DigitsConfig():
            return list_digits()
        case FolderConfig():
            return list_folder(config)
        case WdsConfig():
            return list_tars(config)


def _stack(images: Iterable[tuple[str, NDArray[np.uint8]]], num_images: int) -> NDArray[np.uint8]:
    stacked, first, shape = None, "", ()
    for i, (name, image) in enumerate(images):
        if stacked is None:
            first, shape = name, image.shape
            stacked = np.empty((num_images, *shape), dtype=np.uint8)
        if image.shape != shape:
            raise ConfigError(_difference(first, shape, name, image.shape))
        stacked[i] = image
    assert stacked is not None, "a selection has at least one image of every class"
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
