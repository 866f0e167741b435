"""Images in a local folder with one sub-folder per class."""

import os
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field, field_validator

from dist_tl.contents import check_pin, relative_to, split_pin
from dist_tl.datasets.decode import IMAGE_SUFFIXES, MAX_FILE_BYTES, decode_image
from dist_tl.datasets.listing import UNLABELLED, Listing, count_suffixes
from dist_tl.datasets.selection import SourceConfig, require_local
from dist_tl.errors import ConfigError, DataError


class FolderConfig(SourceConfig):
    """A folder with one sub-folder of JPEG and PNG files, at any depth, per class."""

    source: Literal["folder"] = "folder"
    path: str = Field(min_length=1, description="Local folder with one sub-folder per class.")
    unlabelled: bool = Field(
        default=False,
        description="Read all images below the folder as one class: for unlabelled pools.",
    )

    _local = field_validator("path")(require_local)

    def named_files(self) -> dict[str, dict[str, Path]]:
        """Returns the files that are read, relative name -> path, by the place that names them."""
        root = _root(self)
        folders = [root] if self.unlabelled else _class_folders(root)
        found = (path for folder in folders for path in _files_below(folder) if _is_image(path))
        return {self.path: relative_to(root, found)}


def list_folder(config: FolderConfig) -> Listing:
    """Lists all images below the class folders, sorted by class name and path.

    Skips hidden files and folders, and files of other types, which it counts.

    Raises:
        ConfigError: the path is not a folder.
        DataError: the folder is empty, or has no sub-folders.
    """
    root = _root(config)
    classes = [] if config.unlabelled else _class_folders(root)
    found = [_files_below(folder) for folder in classes or [root]]
    images = [[path for path in in_class if _is_image(path)] for in_class in found]
    paths = [path for in_class in images for path in in_class]
    if config.unlabelled and not paths:
        raise DataError(f"{root} contains no images; expected {', '.join(IMAGE_SUFFIXES)} files")
    check_pin(config.path, relative_to(root, paths))
    beside = [path for path in root.iterdir() if path.is_file() and not path.name.startswith(".")]
    others = [path for in_class in found for path in in_class if not _is_image(path)]
    return Listing(
        names=[str(path) for path in paths],
        labels=np.repeat(np.arange(len(images)), [len(in_class) for in_class in images]),
        class_names=tuple(folder.name for folder in classes) or (UNLABELLED,),
        read=lambda i: _read(paths[i]),
        passed_over=count_suffixes(others if config.unlabelled else beside + others),
    )


def _root(config: FolderConfig) -> Path:
    root = Path(split_pin(config.path)[0]).expanduser()
    if not root.is_dir():
        existing = "a file" if root.exists() else "nothing"
        raise ConfigError(f"path: expected a folder at {root}, found {existing}")
    return root


def _class_folders(root: Path) -> list[Path]:
    entries = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
    if not entries:
        raise DataError(f"{root} is empty; expected one sub-folder of images per class")
    folders = sorted((entry for entry in entries if entry.is_dir()), key=lambda entry: entry.name)
    if not folders:
        raise DataError(
            f"{root} has files ({min(entry.name for entry in entries)}, ...) but no sub-folders; "
            "move the images of each class into a sub-folder with the name of the class"
        )
    return folders


def _files_below(folder: Path) -> list[Path]:
    """Returns all files, without hidden ones and hidden folders, sorted by relative path."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [f"{place}/{name}" for name in names if not name.startswith(".")]
    return [Path(path) for path in sorted(found)]


def _is_image(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES


def _read(path: Path) -> Image.Image:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path} is larger than {MAX_FILE_BYTES} bytes; scale it down")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return decode_image(data, name=str(path))
