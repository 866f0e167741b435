"""Selection of a source's images: classes, groups of classes, a part, a limit.

The part is selected before classes are chosen or grouped, so that part 0 with one set of class
names and part 1 with another never share an image.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, StrictInt, StrictStr, model_validator

from dist_tl.config import StrictModel
from dist_tl.datasets.decode import as_array
from dist_tl.datasets.domains import DomainConfig
from dist_tl.datasets.images import first_copies, picture_digest
from dist_tl.datasets.listing import Listing
from dist_tl.datasets.splits import assign_parts, draw_evenly
from dist_tl.datasets.views import ViewsConfig
from dist_tl.errors import ConfigError, DataError
from dist_tl.seeds import numpy_rng

# Strict, because YAML 1.1 reads `no` and `yes` as booleans, which would be indices 0 and 1.
ClassKey = StrictInt | StrictStr


class PartConfig(StrictModel):
    """One of several disjoint parts with the same class proportions."""

    index: int | tuple[int, ...] = Field(description="Part or parts to keep, from 0.")
    of: int = Field(ge=1, description="Number of parts.")
    seed: int = Field(
        default=0, description="Seed of the division; use the same seed for disjoint parts."
    )
    together: bool = Field(
        default=False,
        description="Keep identical pictures in one part; decodes all images of the source. Use "
        "the same value for disjoint parts.",
    )

    @model_validator(mode="after")
    def _index_is_below(self) -> "PartConfig":
        if not self.indices or not all(0 <= index < self.of for index in self.indices):
            raise ValueError(f"index {self.index} of {self.of} parts: expected 0..{self.of - 1}")
        return self

    @property
    def indices(self) -> tuple[int, ...]:
        """Indices of the parts to keep."""
        return (self.index,) if isinstance(self.index, int) else self.index


class SourceConfig(StrictModel):
    """Options of every source of labelled images."""

    classes: tuple[ClassKey, ...] | None = Field(
        default=None,
        min_length=1,
        description="Classes to keep, by name or index; renumbered in this order.",
    )
    groups: dict[str, tuple[ClassKey, ...]] | None = Field(
        default=None,
        min_length=1,
        description="New class name -> original classes. New classes are numbered in sorted "
        "order of their names; classes in no group are dropped.",
    )
    part: PartConfig | None = Field(
        default=None, description="Keep one disjoint part of the source."
    )
    size: int | None = Field(
        default=None,
        ge=1,
        le=2048,
        description="Side of the square images in pixels; default: as stored.",
    )
    channels: Literal[1, 3] | None = Field(
        default=None, description="1 gray, 3 colour; default: as stored."
    )
    limit: int | None = Field(
        default=None, ge=1, description="Maximum number of images, drawn evenly from all classes."
    )
    domain: DomainConfig | None = Field(
        default=None, description="Fixed transformation of every image to another domain."
    )
    views: ViewsConfig = Field(
        default=ViewsConfig(kind="natural"), description="Data augmentation in training."
    )

    @model_validator(mode="after")
    def _one_way_of_choosing(self) -> "SourceConfig":
        if self.classes is not None and self.groups is not None:
            raise ValueError("classes and groups both choose classes; keep one of them")
        return self


@dataclass(frozen=True, eq=False)
class Selection:
    """Sorted positions in a listing, with the job's labels and class names."""

    indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


def select(listing: Listing, config: SourceConfig, *, seed: int) -> Selection:
    """Selects the images that a job keeps.

    Args:
        seed: determines which images `limit` keeps, and nothing else.

    Raises:
        ConfigError: a class that does not exist or is chosen twice, or too few images for the
            part or the limit.
        DataError: a chosen class has no images.
    """
    new_label, class_names = _relabelling(config, listing.class_names)
    firsts = _stored_copies(listing) if config.part and config.part.together else None
    _require_images(listing, new_label, firsts, num_parts=config.part.of if config.part else 1)
    keep = new_label[listing.labels] >= 0
    if config.part is not None:
        rng = numpy_rng(config.part.seed, "part of the data", config.part.of)
        part = assign_parts(listing.labels, config.part.of, rng, first_copy=firsts)
        keep &= np.isin(part, config.part.indices)
    indices = np.flatnonzero(keep)
    labels = new_label[listing.labels[indices]]
    if config.limit is not None and config.limit < len(indices):
        if config.limit < len(class_names):
            raise ConfigError(
                f"limit: {config.limit} is less than one image for each of the "
                f"{len(class_names)} classes; raise it or choose fewer classes"
            )
        kept = draw_evenly(labels, config.limit, numpy_rng(seed, "limit"))
        indices, labels = indices[kept], labels[kept]
    return Selection(indices, labels, class_names)


def class_index(key: int | str, class_names: Sequence[str]) -> int:
    """Returns the index of a class that a job names by its name or index.

    Raises:
        ConfigError: there is no such class; the message suggests the nearest name.
    """
    if isinstance(key, int):
        if 0 <= key < len(class_names):
            return key
        hint = f"; write '{key}' in quotes to mean a name" if str(key) in class_names else ""
        raise ConfigError(f"class index {key}: expected 0..{len(class_names) - 1}{hint}")
    if key in class_names:
        return class_names.index(key)
    near = difflib.get_close_matches(key, class_names, n=1, cutoff=0.0)
    raise ConfigError(f"there is no class {key!r}; did you mean {near[0]!r}?")


def _stored_copies(listing: Listing) -> NDArray[np.int64]:
    """Returns the first image with the same pixels as each, before any size, channels or domain.

    Data sets that divide a source may use it in other sizes, and must divide it alike.
    """
    images = (
        as_array(listing.read(i), size=None, channels=None) for i in range(len(listing.names))
    )
    return first_copies([picture_digest(image) for image in images])


def require_local(path: str) -> str:
    """Returns `path` if it is a local path.

    Raises:
        ValueError: it is a URL; labelled data must be local.
    """
    if re.match(r"^[A-Za-z][A-Za-z0-9+.-]+://", path):
        raise ValueError(
            f"{path} is a URL, but labelled data must be in local files; mount the bucket or copy "
            "it to a local folder, and use that path"
        )
    return path


def _relabelling(
    config: SourceConfig, class_names: tuple[str, ...]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Returns the new label of each original class (-1: dropped), and the new class names."""
    groups = _groups(config, class_names)
    new_label = np.full(len(class_names), -1, dtype=np.int64)
    for label, (name, members) in enumerate(groups):
        for member in members:
            if new_label[member] >= 0:
                before = groups[new_label[member]][0]
                twice = f"in {before!r} and {name!r}" if before != name else f"twice in {name!r}"
                twice = twice if config.groups else "listed twice"
                raise ConfigError(f"class {class_names[member]!r} is {twice}; keep it once")
            new_label[member] = label
    return new_label, tuple(name for name, _ in groups)


def _groups(config: SourceConfig, class_names: tuple[str, ...]) -> list[tuple[str, list[int]]]:
    if config.classes is not None:
        chosen = [class_index(key, class_names) for key in config.classes]
        return [(class_names[index], [index]) for index in chosen]
    if config.groups is not None:
        # Sorted, like the keys in a job's fingerprint: the labels must not depend on their order.
        return [
            (name, [class_index(key, class_names) for key in members])
            for name, members in sorted(config.groups.items())
        ]
    return [(name, [index]) for index, name in enumerate(class_names)]


def _require_images(
    listing: Listing,
    new_label: NDArray[np.int64],
    firsts: NDArray[np.int64] | None,
    *,
    num_parts: int,
) -> None:
    drawn = listing.labels if firsts is None else listing.labels[np.unique(firsts)]
    counts = np.bincount(drawn, minlength=len(new_label))
    for index in np.flatnonzero(new_label >= 0):
        name = listing.class_names[index]
        if counts[index] == 0:
            raise DataError(
                f"class {name!r} has no images; add some, or exclude it with classes or groups"
            )
        if counts[index] < num_parts:
            raise ConfigError(
                f"class {name!r} has {counts[index]} images, too few for {num_parts} parts; "
                f"part.of can be at most {counts[index]}"
            )
