"""Identical pictures in the data of a job: where they are, and whether the job may run with them.

Pictures are compared as the job uses them: after its size, channels and domain. The target data
counts by its parts in the first repeat; every other data set is one role.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from pydantic import Field

from dist_tl.config import StrictModel, fingerprint
from dist_tl.datasets.images import LabelledImages
from dist_tl.datasets.selection import PartConfig
from dist_tl.datasets.spec import DataConfig, MixtureConfig, OneSource
from dist_tl.errors import ConfigError
from dist_tl.jobs.places import data_sets, owners
from dist_tl.jobs.spec import JobConfig, TargetDataConfig
from dist_tl.jobs.stages import Part, target_rows
from dist_tl.train.rows import row_positions

PARTS: tuple[Part, ...] = ("train", "pool", "test")
OWN_DATA = "data"  # what a job without a target is about, e.g. the data of a layer search


class SharedPictures(StrictModel):
    """Identical pictures in two roles, or within one data set."""

    first: str = Field(description="Field of a data set, with the part of the target in brackets.")
    second: str = Field(description="The same as `first`: copies within one data set.")
    pictures: int = Field(description="Number of different pictures that are in both.")
    example: tuple[str, str] = Field(description="Names of two identical images.")
    labels_differ: int = Field(
        default=0, description="Of the pictures within a data set: those with several labels."
    )

    @property
    def text(self) -> str:
        """One line for people."""
        names = f"e.g. {self.example[0]} = {self.example[1]}"
        if self.first != self.second:
            return f"{_count(self.pictures)} of {self.first} also in {self.second}, {names}"
        differ = f", {self.labels_differ} of them with different labels"
        differ = differ if self.labels_differ else ""
        return f"{_count(self.pictures)} more than once in {self.first}{differ}, {names}"


@dataclass(frozen=True)
class _Role:
    """Images of a data set that a job uses for one purpose; `first` has one position a picture."""

    name: str
    field: str
    names: Sequence[str]
    first: dict[bytes, int]


class PictureIndex:
    """The pictures of a job's data sets, which are added one by one; keeps hashes, not pixels."""

    def __init__(self, job: JobConfig) -> None:
        self._job, self._owners = job, owners(job)
        self._within: list[SharedPictures] = []
        self._roles: list[_Role] = []

    def add(self, field: str, images: LabelledImages) -> None:
        """Adds the data set of a field.

        Raises:
            ConfigError: the target's split does not fit its data.
        """
        self._within += _within(field, images)
        owner = self._owners[field.rpartition(".")[0]]
        self._roles += _roles(self._job, field, owner, images)

    def shared(self) -> tuple[SharedPictures, ...]:
        """Returns the identical pictures, those within a data set first."""
        pairs = (_between(first, second) for first, second in combinations(self._roles, 2))
        return (*self._within, *(pair for pair in pairs if pair is not None))


def check_duplicates(job: JobConfig, shared: Sequence[SharedPictures]) -> None:
    """Applies the job's `duplicates`.

    Raises:
        ConfigError: `error`, and the target data has identical pictures or shares some with other
            data; or `together`, and they are in two parts of one source.
    """
    if job.duplicates == "error":
        target = _target_fields(job)
        found = [row for row in shared if {_field(row.first), _field(row.second)} & target]
        if found:
            raise ConfigError(
                f"duplicates: {'; '.join(row.text for row in found)}. Remove the copies, or set "
                "duplicates: together (copies stay on one side of every split of the target data) "
                "or duplicates: allow"
            )
    if job.duplicates == "together":
        data = data_sets(job)
        for row in shared:
            first, second = data[_field(row.first)], data[_field(row.second)]
            if row.first != row.second and _divides_without_copies(first, second):
                raise ConfigError(
                    f"duplicates: together: {row.text}. Both are parts of one source, and a part "
                    "keeps copies together only if it says so: add together: true to `part` in "
                    "both, or set duplicates: allow"
                )


def _roles(job: JobConfig, field: str, owner: object, images: LabelledImages) -> Iterator[_Role]:
    if not isinstance(owner, TargetDataConfig):
        yield _role(field, field, images, range(len(images)))
        return
    for part in PARTS:
        positions = row_positions(target_rows(job, owner, 0, part)).tolist()
        yield _role(f"{field} ({part})", field, images, positions)


def _role(name: str, field: str, images: LabelledImages, positions: Sequence[int]) -> _Role:
    # In reverse, so that the first position of a picture is the one that stays.
    first = {images.digests[i]: i for i in reversed(positions)}
    return _Role(name, field, images.names, first)


def _within(field: str, images: LabelledImages) -> list[SharedPictures]:
    members: defaultdict[int, list[int]] = defaultdict(list)
    for position, first in enumerate(images.first_copy.tolist()):
        members[first].append(position)
    copies = [group for group in members.values() if len(group) > 1]
    if not copies:
        return []
    one, other, *_ = copies[0]
    row = SharedPictures(
        first=field,
        second=field,
        pictures=len(copies),
        example=(images.names[one], images.names[other]),
        labels_differ=sum(len(set(images.labels[group].tolist())) > 1 for group in copies),
    )
    return [row]


def _between(one: _Role, other: _Role) -> SharedPictures | None:
    common = one.first.keys() & other.first.keys()
    if not common:
        return None
    example = min(common, key=one.first.__getitem__)
    return SharedPictures(
        first=one.name,
        second=other.name,
        pictures=len(common),
        example=(one.names[one.first[example]], other.names[other.first[example]]),
    )


def _count(pictures: int) -> str:
    return "1 picture" if pictures == 1 else f"{pictures} pictures"


def _field(role: str) -> str:
    return role.partition(" ")[0]


def _target_fields(job: JobConfig) -> set[str]:
    """Returns the fields of the data that a job measures on."""
    parts = owners(job).items()
    return {OWN_DATA} | {f"{p}.data" for p, part in parts if isinstance(part, TargetDataConfig)}


def _divides_without_copies(one: DataConfig, other: DataConfig) -> bool:
    """Whether the two are disjoint parts of one source that may divide copies."""
    return any(
        _same_division(a.part, b.part) and _place(a) == _place(b)
        for a, b in product(_sources(one), _sources(other))
    )


def _same_division(one: PartConfig | None, other: PartConfig | None) -> bool:
    if one is None or other is None or (one.together and other.together):
        return False
    same = (one.of, one.seed) == (other.of, other.seed)
    return same and not set(one.indices) & set(other.indices)


def _sources(data: DataConfig) -> list[OneSource]:
    return list(data.domains.values()) if isinstance(data, MixtureConfig) else [data]


def _place(data: OneSource) -> str:
    return fingerprint(data.model_dump(mode="json", include={"source", "path"}))
