"""Gallery of pseudo-samples and target samples, as image tiles of an HTML report."""

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
    """Pseudo-samples with their conditions, and samples of the target data.

    Raises:
        ValueError: shapes, dtypes or counts are inconsistent.
    """

    pseudo_images: np.ndarray
    """uint8 [N, H, W, C] with C = 1 or 3."""
    conditions: np.ndarray
    """float32 [N, K]: class probabilities that the generator was conditioned on."""
    source_classes: tuple[str, ...]
    """Names of the K source classes."""
    target_images: np.ndarray
    """uint8 [M, H, W, C]; the image size may differ from that of the pseudo-samples."""
    target_labels: np.ndarray
    """int [M]: indices into `target_classes`."""
    target_classes: tuple[str, ...]
    """Names of the target classes."""
    captions: tuple[str, ...] = ()
    """N captions of the pseudo-samples; may be empty."""
    title: str = "Pseudo samples and their conditions"
    """Heading of the pseudo-samples."""
    subject: str = "pseudo sample for"
    """Start of the alternative text of a pseudo-sample, followed by its top classes."""

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
        unknown = set(self.target_labels.tolist()) - set(range(len(self.target_classes)))
        if unknown:
            expected = f"0..{len(self.target_classes) - 1}"
            raise ValueError(f"target_labels: expected {expected}, got {sorted(unknown)}")


def _require(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {shape}")


@dataclass(frozen=True)
class Share:
    """One class of a condition; `percent` is its probability in percent."""

    name: str
    percent: float


@dataclass(frozen=True)
class Tile:
    """One image with its caption."""

    source: str
    alt: str
    caption: str
    shares: tuple[Share, ...] = ()


def pseudo_tiles(gallery: Gallery) -> list[Tile]:
    """Returns the first `MAX_TILES` pseudo-samples, each with the top classes of its condition."""
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
    """Returns the first `MAX_TILES` target samples, each with the name of its class."""
    rows = zip(gallery.target_images, gallery.target_labels, strict=True)
    names = gallery.target_classes
    return [
        Tile(source=data_uri(image), alt=f"target sample: {names[label]}", caption=names[label])
        for image, label in list(rows)[:MAX_TILES]
    ]


def top_classes(condition: np.ndarray, names: Sequence[str]) -> tuple[Share, ...]:
    """Returns the most likely class and up to two more of at least 0.5 %; ties in class order."""
    order = np.argsort(-condition, kind="stable")[:_TOP_CLASSES]
    first, *rest = (Share(name=names[int(k)], percent=100 * float(condition[k])) for k in order)
    return (first, *(share for share in rest if share.percent >= 0.5))


def data_uri(image: np.ndarray) -> str:
    """Returns `image`, uint8 [H, W, 1 or 3], as a PNG data URI."""
    buffer = io.BytesIO()
    pixels = image[:, :, 0] if image.shape[2] == 1 else image
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
