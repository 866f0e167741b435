"""Job files: YAML with overrides, read into the specification of their kind."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dist_tl.config import apply_overrides, read_yaml, validate
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
    data = apply_overrides(read_yaml(path, name="job file"), overrides)
    kind = kind_named(data.get("kind"), source=str(path))
    return validate(kind.spec(), data, source=str(path))
