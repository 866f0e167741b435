"""Small JSON records of a run, each read and replaced as a whole."""

from typing import TypeVar

from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError
from dist_tl.storage.objects import ObjectStore

Record = TypeVar("Record", bound=StrictModel)


def read_record(store: ObjectStore, key: str, kind: type[Record], *, remedy: str) -> Record | None:
    """Reads a JSON record and validates it, or returns None if it does not exist.

    Args:
        remedy: how to replace a damaged record, for the error message.

    Raises:
        ConfigError: the record is damaged.
    """
    data = store.read_or_none(key)
    if data is None:
        return None
    try:
        return kind.model_validate_json(data)
    except ValueError as error:
        raise ConfigError(f"{key} is damaged: {error}; {remedy}") from None
