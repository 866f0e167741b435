"""Notes beside a run: small JSON files that say one thing and are replaced as a whole."""

from typing import TypeVar

from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError
from dist_tl.storage.objects import ObjectStore

Record = TypeVar("Record", bound=StrictModel)


def read_record(store: ObjectStore, key: str, kind: type[Record], *, remedy: str) -> Record | None:
    """What a note says; None where there is none.

    Args:
        remedy: what replaces a damaged one, for the message.

    Raises:
        ConfigError: it is damaged.
    """
    data = store.read_or_none(key)
    if data is None:
        return None
    try:
        return kind.model_validate_json(data)
    except ValueError as error:
        raise ConfigError(f"{key} is damaged: {error}; {remedy}") from None
