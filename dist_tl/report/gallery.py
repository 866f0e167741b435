"""Pseudo samples beside target samples, as tiles of a page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

MAX_TILES = 48
_TOP_CLASSES = 3


@dataclass(frozen=True)
class Gallery:
    """Images to look at: what the generator made, and what it should help with.

    Raises:
        ValueError: the shapes, types or counts do not fit each other.
    """

    pseudo_images: np.ndarray
    """uint8 [N, H, W, C], C being 1 or 3."""
    conditions: np.ndarray
    """float32 [N, K]: what the generator was given for each image, rows on the simplex."""
    source_classes: tuple[str, ...]
    """K names."""
    target_images: np.ndarray
    """uint8 [M, H, W, C]; the size may differ from that of the pseudo images."""
    target_labels: np.ndarray
    """int [M]."""
    target_classes: tuple[str, ...]
    captions: tuple[str, ...] = ()
    """N texts shown under the pseudo images, or none."""
    title: str = "Pseudo samples and their conditions"
    """What the pseudo images and their bars are."""
    subject: str = "pseudo sample for"
    """What one of them is called where it cannot be seen, before the names of its bars."""

    def __post_init__(self) -> None:
        for name in ("pseudo_images", "target_images"):
            images = getattr(self, name)
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
                expected = "uint8 [N, H, W, 1 or 3]"
                raise ValueError(f"{name}: expected {expected}, got {images.dtype} {images.shape}")
        count = len(self.pseudo_images)
        _require("conditions", self.conditions.shape, (count, len(self.source_classes)))
        _require("target_labels", self.target_labels.shape, (len(self.target_images),))
        if self.captions:
            _require("captions", (len(self.captions),), (count,))
        wrong = set(self.target_labels.tolist()) - set(range(len(self.target_classes)))
        if wrong:
            expected = f"0..{len(self.target_classes) - 1}"
            raise ValueError(f"target_labels: expected {expected}, got {sorted(wrong)}")


def _require(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {shape}")


@dataclass(frozen=True)
class Share:
    """One class of a condition; `percent` is its probability in per cent."""

    name: str
    percent: float


@dataclass(frozen=True)
class Tile:
    """One image of the page with what is written under it."""

    source: str
    alt: str
    caption: str
    shares: tuple[Share, ...] = ()


def pseudo_tiles(gallery: Gallery) -> list[Tile]:
    """The first `MAX_TILES` pseudo images, each with the top classes of its condition."""
    captions = gallery.captions or ("",) * len(gallery.pseudo_images)
    rows = zip(gallery.pseudo_images, gallery.conditions, captions, strict=True)
    tiles = []
    for image, condition, caption in list(rows)[:MAX_TILES]:
        shares = top_classes(condition, gallery.source_classes)
        weights = ", ".join(f"{share.name} {share.percent:.0f} %" for share in shares)
        alt = f"{gallery.subject} {weights}"
        tiles.append(Tile(source=data_uri(image), alt=alt, caption=caption, shares=shares))
    return tiles


def target_tiles(gallery: Gallery) -> list[Tile]:
    """The first `MAX_TILES` target images, each with the name of its class."""
    rows = zip(gallery.target_images, gallery.target_labels, strict=True)
    names = gallery.target_classes
    return [
        Tile(source=data_uri(image), alt=f"target sample: {names[label]}", caption=names[label])
        for image, label in list(rows)[:MAX_TILES]
    ]


def top_classes(condition: np.ndarray, names: Sequence[str]) -> tuple[Share, ...]:
    """The likeliest class and up to two more of at least half a per cent; ties in class order."""
    order = np.argsort(-condition, kind="stable")[:_TOP_CLASSES]
    first, *rest = (Share(name=names[k], percent=100 * float(condition[k])) for k in order)
    return (first, *(share for share in rest if share.percent >= 0.5))


def data_uri(image: np.ndarray) -> str:
    """`image`, uint8 [H, W, 1 or 3], as a PNG inside a URI."""
    buffer = io.BytesIO()
    pixels = image[:, :, 0] if image.shape[2] == 1 else image
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
