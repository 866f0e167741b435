"""Labelled images in local webdataset tars: members KEY.jpg or KEY.png, and KEY.cls.

The tars are indexed once and images are read at their offsets, so only the images that a job keeps
are decoded. Nothing is extracted to disk or unpickled.
"""

import glob
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from dist_tl.contents import check_pin, relative_to, split_pin
from dist_tl.datasets.decode import IMAGE_SUFFIXES, MAX_FILE_BYTES, decode_image
from dist_tl.datasets.listing import UNLABELLED, Listing, count_suffixes
from dist_tl.datasets.selection import SourceConfig, require_local
from dist_tl.errors import ConfigError, DataError

MAX_LABEL = 1_000_000


class WdsConfig(SourceConfig):
    """Webdataset tars of images with integer labels."""

    source: Literal["wds"] = "wds"
    path: str | tuple[str, ...] = Field(
        min_length=1, description="One tar, several tars, or glob patterns (data/train-*.tar)."
    )
    classes_file: str | None = Field(
        default=None,
        description="Text file of class names, one per line; default: the labels themselves.",
    )

    unlabelled: bool = Field(
        default=False,
        description="Read all images as one class and ignore .cls: for unlabelled pools.",
    )

    @field_validator("path", "classes_file")
    @classmethod
    def _local(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for path in (value,) if isinstance(value, str) else value or ():
            require_local(path)
        return value

    def named_files(self) -> dict[str, dict[str, Path]]:
        """Returns the files that are read, name -> path, by the place that names them."""
        files = {pattern: _matches(pattern) for pattern in _patterns(self)}
        if self.classes_file is not None:
            path = Path(split_pin(self.classes_file)[0]).expanduser()
            files[self.classes_file] = {path.name: path}
        return files


@dataclass(frozen=True)
class _Member:
    """Location of the bytes of one tar member."""

    tar: Path
    name: str
    offset: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.name} in {self.tar}"

    def read(self) -> bytes:
        try:
            with self.tar.open("rb") as file:
                file.seek(self.offset)
                return file.read(self.num_bytes)
        except OSError as error:
            raise DataError(f"{self} cannot be read: {error.strerror}") from None


def list_tars(config: WdsConfig) -> Listing:
    """Lists all samples of the tars, in the order of the paths and of their members.

    Skips members that are neither images nor `.cls`, and counts them.

    Raises:
        ConfigError: a path or pattern matches nothing, or a tar is named twice.
        DataError: a file is not an uncompressed tar, a member has an unsafe name or is too large, a
            sample lacks its image or label, or a label is not a valid class index.
    """
    patterns = _patterns(config)
    for place, files in config.named_files().items():
        check_pin(place, files)
    if config.unlabelled:
        return _list_unlabelled(patterns)
    others: list[str] = []
    samples = [sample for tar in _tar_paths(patterns) for sample in _samples(tar, others)]
    if not samples:
        raise DataError(f"{', '.join(patterns)}: no members KEY.jpg or KEY.png with KEY.cls")
    images = [image for image, _ in samples]
    labels = np.array([_label(member) for _, member in samples], dtype=np.int64)
    if config.classes_file is None:
        class_names = tuple(str(label) for label in range(labels.max() + 1))
    else:
        class_names = _class_names(Path(split_pin(config.classes_file)[0]).expanduser())
    if labels.max() >= len(class_names):
        _, member = samples[int(labels.argmax())]
        raise DataError(
            f"{member} is {labels.max()}, but {config.classes_file} names {len(class_names)} "
            f"classes (labels 0..{len(class_names) - 1}); correct one of them"
        )
    return Listing(
        names=[str(image) for image in images],
        labels=labels,
        class_names=class_names,
        read=lambda i: decode_image(images[i].read(), name=str(images[i])),
        passed_over=count_suffixes(others),
    )


def _list_unlabelled(patterns: tuple[str, ...]) -> Listing:
    others: list[str] = []
    images = [image for tar in _tar_paths(patterns) for image in _images(tar, others).values()]
    if not images:
        raise DataError(f"{', '.join(patterns)}: no members KEY.jpg or KEY.png")
    return Listing(
        names=[str(image) for image in images],
        labels=np.zeros(len(images), dtype=np.int64),
        class_names=(UNLABELLED,),
        read=lambda i: decode_image(images[i].read(), name=str(images[i])),
        passed_over=count_suffixes(others),
    )


def _images(tar: Path, others: list[str]) -> dict[str, _Member]:
    """Returns the images of a tar by key; adds the names of other members to `others`."""
    images: dict[str, _Member] = {}
    for member in _members(tar):
        key, suffix = _key_and_suffix(member.name)
        if suffix in IMAGE_SUFFIXES:
            _add(images, key, member)
        elif suffix != "cls" and not _is_hidden(member.name):
            others.append(member.name)
    return images


def _patterns(config: WdsConfig) -> tuple[str, ...]:
    return (config.path,) if isinstance(config.path, str) else config.path


def _matches(place: str) -> dict[str, Path]:
    """Returns the files that a path or a pattern names, sorted by path, by their names."""
    pattern = split_pin(place)[0]
    literal = Path(pattern).expanduser()
    # An existing path is used literally, even if it contains a bracket.
    paths = [literal] if literal.exists() else sorted(map(Path, glob.glob(str(literal))))
    if not paths:
        raise ConfigError(f"path: nothing matches {pattern}; expected a local file or a pattern")
    for path in paths:
        if path.is_dir():
            raise ConfigError(f"path: {path} is a folder; use its tars, e.g. {path}/*.tar")
    return relative_to(Path(os.path.commonpath([path.parent for path in paths])), paths)


def _tar_paths(patterns: tuple[str, ...]) -> list[Path]:
    paths = [path for pattern in patterns for path in _matches(pattern).values()]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"path: {path} is named twice; name each tar once")
    return paths


def _samples(tar: Path, others: list[str]) -> Iterator[tuple[_Member, _Member]]:
    """Yields (image, label) of every sample of a tar; adds the names of others to `others`."""
    images: dict[str, _Member] = {}
    labels: dict[str, _Member] = {}
    for member in _members(tar):
        key, suffix = _key_and_suffix(member.name)
        if suffix in IMAGE_SUFFIXES:
            _add(images, key, member)
        elif suffix == "cls":
            _add(labels, key, member)
        elif not _is_hidden(member.name):
            others.append(member.name)
    for key, label in labels.items():
        if key not in images:
            raise DataError(f"{label} has no image {key}.jpg or {key}.png in its tar; add it")
    for key, image in images.items():
        if key not in labels:
            raise DataError(f"{image} has no label {key}.cls in its tar; add it")
        yield image, labels[key]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _key_and_suffix(name: str) -> tuple[str, str]:
    # As in webdataset: the key ends at the first dot of the file name.
    folder, slash, file_name = name.rpartition("/")
    stem, _, suffix = file_name.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _add(members: dict[str, _Member], key: str, member: _Member) -> None:
    if key in members:
        raise DataError(f"{member} and {members[key].name} share the key {key!r}; keep one")
    members[key] = member


def _members(tar: Path) -> Iterator[_Member]:
    """Yields the regular files of an uncompressed tar, with checked names and sizes."""
    end = 0
    try:
        with tarfile.open(tar, mode="r:") as archive:
            for info in archive:
                _check_member(info, tar)
                if info.isreg():
                    yield _Member(tar, info.name, info.offset_data, info.size)
                end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        _require_end_mark(tar, end)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{tar} is not an uncompressed tar ({error}); decompress it") from None
    except OSError as error:
        raise DataError(f"{tar} cannot be read: {error.strerror}") from None


def _require_end_mark(tar: Path, end: int) -> None:
    # tarfile treats truncated or damaged headers after the first member as the end of the archive.
    with tar.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{tar} is truncated or damaged at byte {end}; copy the file again")


def _check_member(info: tarfile.TarInfo, tar: Path) -> None:
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts or "\\" in info.name:
        raise DataError(f"{tar} has a member with the unsafe name {info.name!r}; repack it")
    if not (info.isreg() or info.isdir()) or info.issparse():
        raise DataError(f"{info.name} in {tar} is a link or special file; use regular files only")
    if info.size > MAX_FILE_BYTES:
        raise DataError(
            f"{info.name} in {tar} has {info.size} bytes, more than {MAX_FILE_BYTES}; scale it down"
        )


def _label(member: _Member) -> int:
    text = member.read()[:64]
    try:
        label = int(text)
    except ValueError:
        raise DataError(f"{member} contains {text[:20]!r}; expected an integer label") from None
    if not 0 <= label < MAX_LABEL:
        raise DataError(f"{member} contains {label}; expected a label in 0..{MAX_LABEL - 1}")
    return label


def _class_names(path: Path) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in path.read_text("utf-8").splitlines())
    except OSError as error:
        raise ConfigError(f"classes_file: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; expected one class name per line") from None
    if not names or "" in names or len(set(names)) < len(names):
        raise DataError(f"{path} is empty or has an empty or duplicate line; use one name per line")
    return names
