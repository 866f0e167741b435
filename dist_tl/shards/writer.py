"""Writes shards to the store: the tar first, then the entry that commits it.

The bytes of a shard depend on its order and samples only; host, time and duration are recorded in
the entry.
"""

import hashlib
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from dist_tl.config import StrictModel
from dist_tl.errors import ShardError
from dist_tl.shards.manifest import ShardEntry, read_entry
from dist_tl.shards.order import ShardOrder, ShardPlan
from dist_tl.shards.sample import PseudoSample, encode
from dist_tl.shards.tar import pack_tar
from dist_tl.storage.layout import entry_key, shard_key
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import write_record


class ShardConfig(StrictModel):
    """How pseudo samples are packed, and their reading order."""

    samples_per_shard: int = Field(
        default=1024, ge=1, description="Samples per shard; the most that a lost worker loses."
    )
    format: Literal["png", "npy"] = Field(
        default="png",
        description="Image format; images without 1 or 3 channels are always npy.",
    )
    lanes: int = Field(
        default=8,
        ge=1,
        description="Sequences of shards that are divided among trainers; fixes the data order.",
    )
    window: int = Field(
        default=1,
        ge=1,
        description="Number of shards of a lane that are shuffled together and held in memory.",
    )

    def plan(
        self, *, stage: str, purpose: str, num_samples: int, seed: int, fingerprint: str
    ) -> ShardPlan:
        """Returns the plan of a stage; the arguments are fields of :class:`ShardPlan`."""
        return ShardPlan(
            **self.model_dump(),
            stage=stage,
            purpose=purpose,
            num_samples=num_samples,
            seed=seed,
            fingerprint=fingerprint,
        )


@dataclass(frozen=True)
class PackedShard:
    """A packed shard, ready to be committed."""

    order: ShardOrder
    data: bytes
    sha256: str


def pack_shard(order: ShardOrder, samples: Iterable[PseudoSample]) -> PackedShard:
    """Packs `samples` into a tar. Consumes one sample at a time: lazy iterables save memory.

    Raises:
        ValueError: the samples are not exactly those of the order, sorted by number; or they
            differ in shape or in the kind of label.
    """
    data = pack_tar(encode(s, format=order.format) for s in _check_samples(order, samples))
    return PackedShard(order, data, hashlib.sha256(data).hexdigest())


def _check_samples(order: ShardOrder, samples: Iterable[PseudoSample]) -> Iterable[PseudoSample]:
    expected = iter(order.numbers)
    kind = None
    for sample in samples:
        if sample.number != (number := next(expected, None)):
            raise ValueError(
                f"shard {order.index}: expected sample {number}, got {sample.number}; it holds "
                f"{order.numbers.start}..{order.numbers.stop - 1} in this order"
            )
        kind = _kind(sample) if kind is None else kind
        if _kind(sample) != kind:
            raise ValueError(f"sample {sample.number}: expected {kind}, got {_kind(sample)}")
        yield sample
    if (missing := next(expected, None)) is not None:
        raise ValueError(f"shard {order.index}: sample {missing} and all later ones are missing")


def _kind(sample: PseudoSample) -> str:
    """Returns the properties that all samples of a shard must share to be batched."""
    soft = None if sample.soft is None else sample.soft.shape
    return f"image {sample.image.shape}, label {sample.label is not None}, soft label {soft}"


def commit_shard(
    packed: PackedShard,
    store: ObjectStore,
    *,
    seconds: float,
    attempt: int = 0,
) -> ShardEntry:
    """Stores a packed shard, then its entry. Keeps an existing shard.

    Args:
        seconds: wall-clock time since the start of the order, for the entry.
        attempt: number of earlier attempts at this order, for the entry.

    Returns:
        The committed entry, which may be another attempt's.

    Raises:
        ShardError: another attempt made different bytes for the same order.
        StorageError: the store rejects the request.
    """
    order = packed.order
    started = time.monotonic()
    existing = read_entry(store, order.stage, order.index)
    if existing is not None:
        return _check_match(existing, packed)
    store.write(shard_key(order.stage, order.index), packed.data)
    entry = ShardEntry(
        index=order.index,
        key=shard_key(order.stage, order.index),
        sha256=packed.sha256,
        bytes=len(packed.data),
        samples=order.num_samples,
        order=order.digest,
        seconds=round(seconds + time.monotonic() - started, 6),
        host=socket.gethostname(),
        committed_at=round(time.time(), 3),
        attempt=attempt,
    )
    key = entry_key(order.stage, order.index)
    if write_record(store, key, entry, create_only=True):
        return entry
    winner = read_entry(store, order.stage, order.index)
    if winner is None:
        raise ShardError(f"{key} disappeared during the write; is the run being deleted?")
    return _check_match(winner, packed)


def _check_match(entry: ShardEntry, packed: PackedShard) -> ShardEntry:
    order = packed.order
    shard = f"shard {order.index} of stage {order.stage!r}"
    if entry.order != order.digest:
        raise ShardError(
            f"{shard} was committed for another order ({entry.order}, this one is {order.digest}); "
            f"delete the stage, or use another run folder"
        )
    if entry.sha256 != packed.sha256:
        raise ShardError(
            f"{shard} was committed by {entry.host} with different bytes than this attempt's "
            f"({entry.sha256[:12]}..., {packed.sha256[:12]}...): the generator is not "
            f"deterministic across these devices; use one kind of device for a stage"
        )
    return entry


def write_shard(
    order: ShardOrder,
    samples: Iterable[PseudoSample],
    store: ObjectStore,
    *,
    attempt: int = 0,
) -> ShardEntry:
    """Packs `samples` and commits them as the shard of `order`.

    If `samples` is lazy, the time to generate them is included in the entry's `seconds`.

    Raises:
        ValueError: the samples do not match the order.
        ShardError: another attempt made different bytes for the same order.
        StorageError: the store rejects the request.
    """
    started = time.monotonic()
    packed = pack_shard(order, samples)
    return commit_shard(packed, store, seconds=time.monotonic() - started, attempt=attempt)
