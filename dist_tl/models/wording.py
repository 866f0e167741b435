"""How errors about networks name things: the nearest name, the first few, one line."""

import difflib
from collections.abc import Collection

from dist_tl.errors import ConfigError


def check_name(what: str, name: str, known: Collection[str]) -> None:
    """Nothing if `name` is in `known`.

    Raises:
        ConfigError: it is not; the message names the nearest one, or all if none is near.
    """
    if name not in known:
        near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {few(known, 60)}"
        raise ConfigError(f"{what} {name!r} is not known; {hint}")


def few(names: Collection[str], limit: int = 5) -> str:
    """The first names in alphabetical order, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + more


def one_line(error: Exception) -> str:
    """What another library's error says, on one line of at most 300 characters."""
    return " ".join((str(error) or type(error).__name__).split())[:300]
