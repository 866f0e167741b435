"""Records of a run: small JSON objects, each read and replaced as a whole.

A record is sealed: its first key is the SHA-256 of the others as they are written, so a record that
was altered or cut short is told apart from the one that was written.
"""

import hashlib
import re
from typing import TypeVar

from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError, DamagedError
from dist_tl.storage.layout import marker_of
from dist_tl.storage.objects import ObjectStore

Record = TypeVar("Record", bound=StrictModel)
_SEAL = re.compile(rb'\{"sha256": "([0-9a-f]{64})",')


def seal(text: str) -> bytes:
    """Returns the JSON object `text` with its SHA-256 as the first key.

    Raises:
        ValueError: `text` is not a JSON object with at least one key.
    """
    body = text.strip().encode()
    if not body.startswith(b"{") or body[1:].lstrip()[:1] != b'"':
        raise ValueError(f"expected a JSON object with a key, got {text[:40]!r}")
    return b'{"sha256": "%s",%s' % (hashlib.sha256(body).hexdigest().encode(), body[1:])


def unseal(data: bytes) -> bytes:
    """Returns the JSON object that :func:`seal` received.

    Raises:
        ValueError: the object was altered, cut short, or never sealed.
    """
    match = _SEAL.match(data)
    body = b"{" + data[match.end() :] if match else b""
    if match is None or hashlib.sha256(body).hexdigest().encode() != match[1]:
        raise ValueError("it is not the record that was written (its SHA-256 differs)")
    return body


def write_record(
    store: ObjectStore, key: str, record: StrictModel, *, create_only: bool = False
) -> bool:
    """Writes a sealed record. Returns the result of :meth:`ObjectStore.write`."""
    return store.write(key, seal(record.model_dump_json(indent=1)), create_only=create_only)


def read_record(store: ObjectStore, key: str, kind: type[Record], *, remedy: str) -> Record | None:
    """Reads a sealed record and validates it, or returns None if it does not exist.

    Args:
        remedy: how to replace a damaged record, for the error message.

    Raises:
        DamagedError: the record is not the one that was written.
        ConfigError: another version of dist_tl wrote it.
    """
    data = store.read_or_none(key)
    return None if data is None else parse_record(data, key, kind, remedy=remedy)


def parse_record(data: bytes, key: str, kind: type[Record], *, remedy: str) -> Record:
    """Validates the bytes of a sealed record, as :func:`read_record` does."""
    try:
        body = unseal(data)
    except ValueError as error:
        raise damaged(key, str(error), remedy=remedy) from None
    try:
        return kind.model_validate_json(body)
    except ValueError as error:
        raise ConfigError(
            f"{key} was written by another version of dist_tl: {error}; use that version, or "
            "another run folder"
        ) from None


def damaged(key: str, problem: str, *, remedy: str) -> DamagedError:
    """Returns the error of a damaged object of a run.

    Args:
        key: of the object, relative to the run.
    """
    return DamagedError.of(f"{key} is damaged: {problem}; {remedy}", marker_of(key))
