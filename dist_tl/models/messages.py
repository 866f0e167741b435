"""Parts of error messages about networks: suggested names, short lists, one-line causes."""

import difflib
from collections.abc import Collection

from dist_tl.errors import ConfigError


def check_name(kind: str, name: str, known: Collection[str]) -> None:
    """Checks that `name` is one of the known names.

    Args:
        kind: the kind of name, for the message, e.g. "architecture".

    Raises:
        ConfigError: it is not; the message suggests the closest name, or lists the known ones.
    """
    if name not in known:
        close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {join_names(known, 60)}"
        raise ConfigError(f"{kind} {name!r} is not known; {hint}")


def join_names(names: Collection[str], limit: int = 5) -> str:
    """Returns the first names in alphabetical order and the number of further ones."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + more


def one_line(error: Exception) -> str:
    """Returns another library's error message on one line of at most 300 characters."""
    return " ".join((str(error) or type(error).__name__).split())[:300]
