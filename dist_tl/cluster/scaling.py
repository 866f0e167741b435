"""Sizes of a running job's pools, changed from outside: a word in the run's store.

So it works wherever the run's store is in reach, whatever cluster the job runs on, and holds for
the next start of the run too.
"""

import re
from collections.abc import Sequence

from pydantic import Field, model_validator

from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import read_record

POOLS = ("generators",)
_SIZE = re.compile(r"(\d+)(?:\.\.(\d+))?")


class Bounds(StrictModel):
    """Workers of a pool at least and at most."""

    min: int = Field(ge=0)
    max: int = Field(ge=0)

    @model_validator(mode="after")
    def _are_ordered(self) -> "Bounds":
        if self.min > self.max:
            raise ValueError(f"expected min <= max, got {self.min}..{self.max}")
        return self


class Scale(StrictModel):
    """scale.json of a run."""

    generators: Bounds


def parse_sizes(sizes: Sequence[str]) -> dict[str, Bounds]:
    """`generators=4` or `generators=1..8` as bounds.

    Raises:
        ConfigError: of another form, or of a pool that cannot be scaled.
    """
    found = {}
    for size in sizes:
        pool, _, text = size.partition("=")
        match = _SIZE.fullmatch(text)
        if pool == "trainers":
            raise ConfigError(
                "trainers are one group of fixed size: stop the run and start it with "
                "trainers.workers=N, which goes on from the last checkpoint only with the same N"
            )
        if pool not in POOLS or match is None:
            raise ConfigError(f"expected generators=N or generators=MIN..MAX, got {size!r}")
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise ConfigError(f"{size}: expected MIN <= MAX")
        found[pool] = Bounds(min=low, max=high)
    return found


def write_scale(store: ObjectStore, scale: Scale) -> None:
    """Say what a running job, and later starts of its run, should do.

    Raises:
        StorageError: the store refused.
    """
    store.write(layout.SCALE, scale.model_dump_json().encode())


def read_scale(store: ObjectStore) -> Scale | None:
    """What was said last; None where nothing was.

    Raises:
        ConfigError: the file is damaged.
    """
    return read_record(store, layout.SCALE, Scale, remedy="scale again")
