"""Job files: YAML with overrides, read into the specification of their kind."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dist_tl.config import apply_overrides, parse_yaml, validate
from dist_tl.errors import ConfigError
from dist_tl.jobs.kinds import kind_named

if TYPE_CHECKING:
    from dist_tl.jobs.spec import JobConfig


def read_job(path: str | Path, overrides: Sequence[str] = ()) -> "JobConfig":
    """Reads a job file and applies overrides.

    Args:
        overrides: `a.b=value` each; values are YAML.

    Raises:
        ConfigError: the file is missing, or has a key or value that its kind does not take.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the job file {path}: {error.strerror}") from None
    data = apply_overrides(parse_yaml(text, source=str(path)), overrides)
    kind = kind_named(data.get("kind"), source=str(path))
    return validate(kind.spec(), data, source=str(path))
