"""Tensors in the store of a run: safetensors files that hold their own digest.

The metadata has the SHA-256 of the file, computed with zeros in the digest's place.
"""

import hashlib
import re
from collections.abc import Mapping

from safetensors.torch import load, save
from torch import Tensor

from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import damaged

_ZEROS = "0" * 64
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
REMEDY = "start the same job again, which makes it again"


def sealed_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Returns a safetensors file with its own digest. Tensors must be contiguous."""
    data = save(dict(tensors), metadata={**(metadata or {}), "sha256": _ZEROS})
    place = _DIGEST.search(data)
    assert place is not None, "the metadata was just written"
    return _with_digest(data, place, hashlib.sha256(data).hexdigest())


def _with_digest(data: bytes, place: re.Match[bytes], digest: str) -> bytes:
    return data[: place.start(1)] + digest.encode() + data[place.end(1) :]


def write_tensors(
    store: ObjectStore,
    key: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors, which must be contiguous, with their digest."""
    store.write(key, sealed_tensors(tensors, metadata))


def read_tensors(store: ObjectStore, key: str) -> dict[str, Tensor]:
    """Reads tensors that :func:`write_tensors` wrote.

    Raises:
        DamagedError: they are missing, altered or cut short.
    """
    return load(read_sealed(store, key))


def read_sealed(store: ObjectStore, key: str) -> bytes:
    """Returns the bytes of a safetensors file whose digest is right; raises as `read_tensors`."""
    data = store.read_or_none(key)
    if data is None:
        raise damaged(key, "it is missing", remedy=REMEDY)
    place = _DIGEST.search(data)
    blank = data if place is None else _with_digest(data, place, _ZEROS)
    if place is None or hashlib.sha256(blank).hexdigest().encode() != place[1]:
        raise damaged(key, "it is not the file that was written", remedy=REMEDY)
    return data
