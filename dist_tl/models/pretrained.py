"""Folders of pretrained classifiers: local copies and the pixel statistics of their training data.

Only JSON and safetensors files are downloaded from a hub: never a pickle, never code.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dist_tl.contents import check_pin, relative_to, split_pin
from dist_tl.errors import ConfigError
from dist_tl.models.inputs import Normalise
from dist_tl.models.messages import one_line

_FILES = ("config.json", "*processor_config.json", "*.safetensors", "*.safetensors.index.json")

MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def local_folder(
    place: str, *, patterns: Sequence[str] = _FILES, revision: str | None = None
) -> Path:
    """Returns the folder at `place`, or a local copy of the hub repository of that name.

    Args:
        patterns: the files that are read; only these are downloaded.

    Raises:
        ConfigError: neither exists.
        DataError: `place` is pinned to other contents.
    """
    path = split_pin(place)[0]
    folder = Path(path).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            copy = snapshot_download(path, revision=revision, allow_patterns=list(patterns))
        except Exception as error:
            raise ConfigError(
                f"{path} is neither a local folder nor a model that can be downloaded from the "
                f"hub: {one_line(error)}"
            ) from error
        folder = Path(copy)
    check_pin(place, saved_files(folder))
    return folder


def saved_files(folder: Path) -> dict[str, Path]:
    """Returns the JSON and safetensors files below a folder by their relative names."""
    found = (path for suffix in ("json", "safetensors") for path in folder.rglob(f"*.{suffix}"))
    return relative_to(folder, sorted(found))


def require_weights(folder: Path) -> Path:
    """Returns `folder` if it has a safetensors file.

    Raises:
        ConfigError: it has none.
    """
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{folder} has no *.safetensors file, and pickled weights are never loaded; save the "
            "model again with save_pretrained"
        )
    return folder


def downloaded_folder(name: str) -> Path | None:
    """Returns the local copy of a hub repository; None if there is none. Downloads nothing."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # the library raises many kinds, and all of them mean the same here
        return None


def count_parameters(file: BinaryIO) -> int:
    """Returns the number of learnable values in a safetensors file; reads its header only.

    Integer tensors and the statistics of batch normalisation are not learnt.

    Raises:
        ConfigError: the file has no header of safetensors.
    """
    num_bytes = int.from_bytes(file.read(8), "little")
    if num_bytes > MAX_HEADER_BYTES:  # of a damaged file; reading it would exhaust the memory
        raise ConfigError(f"expected a safetensors file, found a header of {num_bytes} bytes")
    try:
        header = json.loads(file.read(num_bytes))
        return sum(
            math.prod(tensor["shape"])
            for name, tensor in header.items()
            if name != "__metadata__"
            and "F" in tensor["dtype"]
            and not name.endswith(("running_mean", "running_var"))
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"expected a safetensors file: {one_line(error)}") from None


def saved_statistics(folder: Path) -> Normalise | None:
    """Returns mean and standard deviation, for pixels in [0, 1], of the folder's image processor.

    None if the folder has no processor file; images then stay in [-1, 1].

    Raises:
        ConfigError: the processor's file is not JSON, or its numbers are invalid.
    """
    options = _processor_options(folder)
    if options is None:
        return None
    try:
        return _statistics(options)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{folder}: its image processor has no usable image_mean and image_std ({error!r}); "
            "set normalise"
        ) from error


def _statistics(options: dict[str, Any]) -> Normalise:
    normalises = options.get("do_normalize", "image_mean" in options)
    mean, std = (options["image_mean"], options["image_std"]) if normalises else (0.0, 1.0)
    # A processor multiplies pixels of 0..255 by this factor, 1/255 by default.
    rescale = options.get("rescale_factor", 1 / 255) if options.get("do_rescale", True) else 1.0
    return Normalise(mean=_divided(mean, 255 * rescale), std=_divided(std, 255 * rescale))


def _processor_options(folder: Path) -> dict[str, Any] | None:
    nested = _read_json(folder / "processor_config.json").get("image_processor")
    return nested or _read_json(folder / "preprocessor_config.json") or None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None


def _divided(values: float | list[float], divisor: float) -> tuple[float, ...]:
    values = values if isinstance(values, list) else [values]
    return tuple(value / divisor for value in values)
