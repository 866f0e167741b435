"""Scaling overrides: bounds of a running job's pools, stored as `scale.json` in the run's store.

An override needs access only to the store, not to the cluster of the job. It also applies to later
attempts of the run.
"""

import re
from collections.abc import Sequence

from dist_tl.cluster.config import Bounds
from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import read_record, write_record

POOLS = ("generators",)
_SIZE = re.compile(r"(\d+)(?:\.\.(\d+))?")


class Scale(StrictModel):
    """The content of scale.json."""

    generators: Bounds


def parse_sizes(sizes: Sequence[str]) -> dict[str, Bounds]:
    """Parses sizes such as `generators=4` or `generators=1..8`; returns bounds by pool.

    Raises:
        ConfigError: a size is malformed, or its pool cannot be scaled.
    """
    bounds = {}
    for size in sizes:
        pool, _, text = size.partition("=")
        match = _SIZE.fullmatch(text)
        if pool == "trainers":
            raise ConfigError(
                "trainers are one group of fixed size: stop the run and start it with "
                "trainers.workers=N; it resumes from the last checkpoint only with the same N"
            )
        if pool not in POOLS or match is None:
            raise ConfigError(f"expected generators=N or generators=MIN..MAX, got {size!r}")
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise ConfigError(f"{size}: expected MIN <= MAX")
        bounds[pool] = Bounds(min=low, max=high)
    return bounds


def write_scale(store: ObjectStore, scale: Scale) -> None:
    """Stores the override for the running job and later attempts of its run.

    Raises:
        StorageError: writing failed.
    """
    write_record(store, layout.SCALE, scale)


def read_scale(store: ObjectStore) -> Scale | None:
    """Returns the last override, or None if there is none.

    Raises:
        ConfigError: the file is damaged.
    """
    return read_record(store, layout.SCALE, Scale, remedy="scale again")
