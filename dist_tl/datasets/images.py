"""Labelled images in memory (uint8), and their conversion to and from float pixels.

Identical images are found by a hash of their pixels, so a split can keep them on one side.
Not covered: sources of images (`spec.py`) and augmentation (`views.py`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_tl.errors import NumericsError


def to_float(images: NDArray[np.uint8]) -> Tensor:
    """Converts pixels to network inputs: x / 127.5 - 1.

    Args:
        images: uint8 [N, H, W, C].

    Returns:
        float32 [N, C, H, W] in [-1, 1], a new tensor.

    Raises:
        ValueError: the input is not uint8 with four dimensions.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"expected uint8 [N, H, W, C], got {images.dtype} {images.shape}")
    channels_first = images.transpose(0, 3, 1, 2).astype(np.float32, order="C")
    return torch.from_numpy(channels_first).div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Inverts :func:`to_float`: rounds to the nearest level and clamps to 0..255.

    Args:
        images: floating point [N, C, H, W] on any device.

    Returns:
        uint8 [N, H, W, C].

    Raises:
        ValueError: the input is not floating point with four dimensions.
        NumericsError: a pixel is NaN or infinite; the message names the first such image.
    """
    if not images.is_floating_point() or images.ndim != 4:
        raise ValueError(f"expected floating [N, C, H, W], got {images.dtype} {images.shape}")
    pixels = images.detach().to("cpu", torch.float32)
    broken = ~pixels.isfinite().flatten(1).all(dim=1)
    if bool(broken.any()):
        first = int(broken.nonzero()[0])
        raise NumericsError(f"image {first} of {len(pixels)} has a pixel that is not finite")
    levels = ((pixels + 1.0) * 127.5).round_().clamp_(0.0, 255.0).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().numpy()


def picture_digest(image: NDArray[np.uint8]) -> bytes:
    """Returns a hash of the shape and the pixels of an image, uint8 [H, W, C]."""
    shape = ",".join(map(str, image.shape)).encode()
    return hashlib.sha256(shape + b":" + image.tobytes()).digest()


def first_copies(digests: Sequence[bytes]) -> NDArray[np.int64]:
    """Returns int64 [N]: for every image the position of the first one with the same digest."""
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(d, i) for i, d in enumerate(digests)], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """A labelled data set in memory.

    Attributes:
        images: uint8 [N, H, W, C], C = 1 or 3.
        labels: int64 [N], indices into `class_names`.
        class_names: one name per class, in the order of the labels.
        domains: int64 [N], indices into `domain_names`; None if there is only one domain.
        domain_names: one name per domain.
        names: one name per image for messages, e.g. the path of its file; empty if unknown.
        passed_over: number of files of the source that are not read, by suffix.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    domains: NDArray[np.int64] | None = None
    domain_names: tuple[str, ...] = ()
    names: Sequence[str] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes; a subset keeps all classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W), the input shape of networks."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> "LabelledImages":
        """Returns the images at `indices`, in that order, with the same class names."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            images=self.images[chosen],
            labels=self.labels[chosen],
            domains=None if self.domains is None else self.domains[chosen],
            names=[self.names[i] for i in chosen] if self.names else (),
        )

    @cached_property
    def digests(self) -> list[bytes]:
        """A hash of the shape and the pixels of every image."""
        return [picture_digest(image) for image in self.images]

    @cached_property
    def first_copy(self) -> NDArray[np.int64]:
        """int64 [N]: for every image the position of the first one with the same pixels."""
        return first_copies(self.digests)

    @property
    def distinct(self) -> NDArray[np.int64]:
        """Sorted positions of the images without the later copies of each."""
        return np.unique(self.first_copy)

    def tensor(self, indices: Sequence[int] | NDArray[np.int64] | None = None) -> Tensor:
        """Returns the images (at `indices`, or all) as float32 [N, C, H, W] in [-1, 1]."""
        return to_float(self.images if indices is None else self.subset(indices).images)
