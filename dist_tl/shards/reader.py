"""Reads one committed shard: fetches it, checks it against its entry, and decodes it.

Not covered: waiting for shards, and the reading order (`stream`).
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dist_tl.errors import DamagedShardError, ShardError
from dist_tl.shards.manifest import ShardEntry, check_entry, read_entry
from dist_tl.shards.order import ShardPlan
from dist_tl.shards.sample import (
    PseudoSample,
    decode,
    decode_label,
    decode_number,
    decode_pixels,
    decode_soft,
)
from dist_tl.shards.tar import BLOCK, walk_tar
from dist_tl.storage.layout import entry_key, shard_key
from dist_tl.storage.objects import ObjectStore

MAX_DECODED_BYTES = 1 << 34


@dataclass(frozen=True)
class DecodedShard:
    """The samples of a shard as read-only columns; row r is the shard's sample r.

    Attributes:
        numbers: int64 [n] sample numbers.
        images: uint8 [n, H, W, C], or float32 if the samples are not pictures.
        labels: int64 [n], or None if the shard has no `.cls`.
        soft: float32 [n, K], or None if the shard has no `.soft.npy`.
    """

    numbers: NDArray[np.int64]
    images: NDArray[np.uint8] | NDArray[np.float32]
    labels: NDArray[np.int64] | None
    soft: NDArray[np.float32] | None

    @property
    def nbytes(self) -> int:
        """Memory of all columns, in bytes."""
        columns = (self.numbers, self.images, self.labels, self.soft)
        return sum(column.nbytes for column in columns if column is not None)


def check_tar(data: bytes | None, stage: str, entry: ShardEntry) -> bytes:
    """Returns `data` if it is the tar that `entry` describes.

    Raises:
        DamagedShardError: it is missing, or its size or hash differs.
    """
    if data is None:
        raise _damaged(stage, entry.index, f"{shard_key(stage, entry.index)} is missing")
    if len(data) != entry.bytes:
        raise _damaged(
            stage, entry.index, f"the tar has {len(data)} bytes, its entry says {entry.bytes}"
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.sha256:
        raise _damaged(
            stage,
            entry.index,
            f"the tar was altered: its hash is {digest[:12]}..., its entry says "
            f"{entry.sha256[:12]}...",
        )
    return data


def fetch_tar(store: ObjectStore, stage: str, entry: ShardEntry) -> bytes:
    """Fetches the tar that `entry` describes.

    Raises:
        DamagedShardError: it is missing, truncated or altered.
        StorageError: the store cannot be read.
    """
    return check_tar(store.read_or_none(shard_key(stage, entry.index)), stage, entry)


def decode_shard(data: bytes, *, stage: str, index: int, numbers: range) -> DecodedShard:
    """Decodes a shard to columns.

    Args:
        data: the tar.
        stage: name for error messages, like `index`.
        numbers: expected sample numbers, in order.

    Raises:
        ShardError: other samples, an unknown kind of member, or samples that differ in shape or
            in the kind of label.
    """
    try:
        return _decode_columns(data, numbers)
    except ShardError as error:
        raise _damaged(stage, index, str(error)) from None


def _decode_columns(data: bytes, numbers: range) -> DecodedShard:
    if len(numbers) * 2 * BLOCK > len(data):
        raise ShardError(f"{len(data)} bytes are too few for {len(numbers)} samples")
    images, labels, soft = None, [], []
    row = -1
    for row, members in enumerate(walk_tar(data)):
        number = decode_number(str(members["__key__"]))
        if row >= len(numbers) or number != numbers[row]:
            raise ShardError(f"sample {number} is not the one expected at row {row}")
        pixels = decode_pixels(members)
        if images is None:
            images = _allocate(len(numbers), pixels)
        if (pixels.shape, pixels.dtype) != (images.shape[1:], images.dtype):
            raise ShardError(
                f"sample {number} has shape {pixels.shape} ({pixels.dtype}), the first has "
                f"{images.shape[1:]} ({images.dtype})"
            )
        images[row] = pixels
        if "cls" in members:
            labels.append(decode_label(members["cls"]))
        if "soft.npy" in members:
            soft.append(decode_soft(members["soft.npy"]))
    if images is None or row + 1 != len(numbers):
        raise ShardError(f"the tar ends after {row + 1} of {len(numbers)} samples")
    return DecodedShard(
        numbers=_read_only(np.arange(numbers.start, numbers.stop, dtype=np.int64)),
        images=_read_only(images),
        labels=_column(labels, np.int64, len(numbers), "label"),
        soft=_column(soft, np.float32, len(numbers), "soft label"),
    )


def _allocate(count: int, pixels: NDArray) -> NDArray:
    if count * pixels.nbytes > MAX_DECODED_BYTES:
        raise ShardError(f"{count} images of {pixels.shape} exceed the size limit of a shard")
    return np.empty((count, *pixels.shape), pixels.dtype)


def _column(values: list, dtype: type, count: int, name: str) -> NDArray | None:
    if not values:
        return None
    if len(values) != count or len({np.shape(value) for value in values}) != 1:
        raise ShardError(f"{len(values)} of {count} samples have a {name}, or they differ in shape")
    return _read_only(np.asarray(values, dtype))


def _read_only(column: NDArray) -> NDArray:
    column.setflags(write=False)
    return column


def read_shard(
    store: ObjectStore, stage: str, index: int, entry: ShardEntry | None = None
) -> list[PseudoSample]:
    """Returns the samples of one committed shard, including provenance: for previews and tests.

    Raises:
        ShardError: not committed, missing, altered, or of an unknown format.
    """
    entry = entry or read_entry(store, stage, index)
    if entry is None:
        raise ShardError(f"shard {index} of stage {stage!r} is not committed (it has no entry)")
    data = fetch_tar(store, stage, entry)
    try:
        samples = [decode(members) for members in walk_tar(data)]
    except ShardError as error:
        raise _damaged(stage, index, str(error)) from None
    if len(samples) != entry.samples:
        raise _damaged(stage, index, f"{len(samples)} samples, its entry says {entry.samples}")
    return samples


def verify_shard(store: ObjectStore, plan: ShardPlan, index: int) -> ShardEntry | None:
    """Reads and checks a shard. Returns its entry, or None if it is not committed yet.

    Raises:
        ShardError: it is missing, altered, or made for another order.
    """
    entry = read_entry(store, plan.stage, index)
    if entry is None:
        return None
    data = fetch_tar(store, plan.stage, check_entry(entry, plan))
    decode_shard(data, stage=plan.stage, index=index, numbers=plan.order(index).numbers)
    return entry


def _damaged(stage: str, index: int, problem: str) -> DamagedShardError:
    return DamagedShardError.of(
        f"shard {index} of stage {stage!r}: {problem}; start the same job again, which generates "
        "it again",
        entry_key(stage, index),
    )
