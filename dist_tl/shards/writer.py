"""Shards into the store: the tar first, then the entry that makes it exist.

The bytes of a shard follow from its order and its samples alone; who wrote it, when, and how long
it took stand in the entry.
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


class ShardConfig(StrictModel):
    """How pseudo samples are packed, and in which order they are read again."""

    samples_per_shard: int = Field(
        default=1024, ge=1, description="Samples in a shard. Also what a lost worker costs at most."
    )
    format: Literal["png", "npy"] = Field(
        default="png",
        description="How images are stored; other than 1 or 3 channels always as npy.",
    )
    lanes: int = Field(
        default=8,
        ge=1,
        description="Sequences of shards that trainers share out; fixes the data order.",
    )
    window: int = Field(
        default=1,
        ge=1,
        description="Shards of a lane that are shuffled together, and held in memory.",
    )

    def plan(
        self, *, stage: str, purpose: str, num_samples: int, seed: int, fingerprint: str
    ) -> ShardPlan:
        """The plan of a stage of `num_samples`; the arguments are fields of :class:`ShardPlan`."""
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
    """A shard ready to be stored."""

    order: ShardOrder
    data: bytes
    sha256: str


def pack_shard(order: ShardOrder, samples: Iterable[PseudoSample]) -> PackedShard:
    """The tar of `samples`. Takes one sample at a time, so a lazy iterable saves memory.

    Raises:
        ValueError: not exactly the samples that the order asks for, in order of their numbers; or
            they differ in shape or in the kind of label.
    """
    data = pack_tar(encode(sample, format=order.format) for sample in _checked(order, samples))
    return PackedShard(order, data, hashlib.sha256(data).hexdigest())


def _checked(order: ShardOrder, samples: Iterable[PseudoSample]) -> Iterable[PseudoSample]:
    expected = iter(order.numbers)
    first = None
    for sample in samples:
        if sample.number != (number := next(expected, None)):
            raise ValueError(
                f"shard {order.index}: expected sample {number}, got {sample.number}; it holds "
                f"{order.numbers.start}..{order.numbers.stop - 1} in this order"
            )
        first = _kind(sample) if first is None else first
        if _kind(sample) != first:
            raise ValueError(f"sample {sample.number}: expected {first}, got {_kind(sample)}")
        yield sample
    if (missing := next(expected, None)) is not None:
        raise ValueError(f"shard {order.index}: sample {missing} and what follows are missing")


def _kind(sample: PseudoSample) -> str:
    """What all samples of a shard must share, so that batches can be made of them."""
    soft = None if sample.soft is None else sample.soft.shape
    return f"image {sample.image.shape}, label {sample.label is not None}, soft label {soft}"


def commit_shard(
    packed: PackedShard,
    store: ObjectStore,
    *,
    seconds: float,
    attempt: int = 0,
    repair: bool = False,
) -> ShardEntry:
    """Store a packed shard, then its entry. A shard that exists already is left as it is.

    Args:
        seconds: wall-clock time since the work on the order began, for the entry.
        attempt: attempts at this order before this one, for the entry.
        repair: put the tar in its place again, where its entry exists and agrees.

    Returns:
        The entry that now stands, which may be another attempt's.

    Raises:
        ShardError: another attempt made other bytes of the same order.
        StorageError: the store refused.
    """
    order = packed.order
    started = time.monotonic()
    existing = read_entry(store, order.stage, order.index)
    if existing is not None:
        _agreeing(existing, packed)
        if repair:
            store.write(shard_key(order.stage, order.index), packed.data)
        return existing
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
    if store.write(key, entry.model_dump_json().encode(), create_only=True):
        return entry
    winner = read_entry(store, order.stage, order.index)
    if winner is None:
        raise ShardError(f"{key} vanished while it was written; is something deleting the run?")
    return _agreeing(winner, packed)


def _agreeing(entry: ShardEntry, packed: PackedShard) -> ShardEntry:
    order = packed.order
    place = f"shard {order.index} of stage {order.stage!r}"
    if entry.order != order.digest:
        raise ShardError(
            f"{place} was committed for another order ({entry.order}, this one is {order.digest}); "
            f"delete the stage, or use another run folder"
        )
    if entry.sha256 != packed.sha256:
        raise ShardError(
            f"{place} was committed by {entry.host} with other bytes than this attempt made "
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
    repair: bool = False,
) -> ShardEntry:
    """Pack `samples` and commit them as the shard that `order` asks for.

    A lazy iterable of samples is made while packing, and its time stands in the entry.

    Raises:
        ValueError: the samples are not those of the order.
        ShardError: another attempt made other bytes of the same order.
        StorageError: the store refused.
    """
    started = time.monotonic()
    packed = pack_shard(order, samples)
    return commit_shard(
        packed, store, seconds=time.monotonic() - started, attempt=attempt, repair=repair
    )
