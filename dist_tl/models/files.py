"""Saves and loads a network as two files, `model.safetensors` and `config.json`. Never a pickle.

The configuration alone rebuilds the network: no hub, no folder, no download.
"""

import json
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor, nn

from dist_tl.config import StrictModel, validate
from dist_tl.errors import ConfigError
from dist_tl.models.finite import check_finite_weights
from dist_tl.models.messages import join_names
from dist_tl.models.networks import AnyNetworkConfig, Network, NetworkConfig, build_network

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class NetworkFile(StrictModel):
    """Content of config.json."""

    network: NetworkConfig
    num_classes: int = Field(ge=2)
    image_shape: tuple[int, int, int]


def save_network(
    network: Network,
    config: AnyNetworkConfig | None = None,
    num_classes: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> dict[str, bytes]:
    """Returns the files of `network`, file name to bytes; equal weights give equal bytes.

    A network has its own configuration; the other arguments are only compared with it, so that
    one arm's weights are not saved with another arm's configuration.

    Raises:
        ConfigError: `config`, `num_classes` or `image_shape` is given and differs from the
            network's own.
    """
    if config is not None and config not in (network.config, network.portable_config):
        raise ConfigError("save_network: this network was built from another configuration")
    _check_equal("classes", num_classes, network.num_classes)
    _check_equal("image shape", image_shape and tuple(image_shape), network.image_shape)
    description = NetworkFile(
        network=network.portable_config,
        num_classes=network.num_classes,
        image_shape=network.image_shape,
    )
    tensors = {name: _stored(tensor) for name, tensor in _distinct_tensors(network).items()}
    return {
        CONFIG: (description.model_dump_json(indent=2) + "\n").encode(),
        WEIGHTS: safetensors.torch.save(tensors),
    }


def load_network(files: Mapping[str, bytes], *, place: str = ".") -> Network:
    """Loads a network that `save_network` wrote, bit for bit, in training mode.

    Args:
        place: where the files were read from, for the message about damaged weights.

    Raises:
        ConfigError: a file is missing or unreadable, or tensors are missing, unexpected, not
            finite, or of another shape or kind than the configuration requires; the message names
            them.
    """
    if absent := [name for name in (CONFIG, WEIGHTS) if name not in files]:
        raise ConfigError(f"a saved network is {CONFIG} and {WEIGHTS}; missing: {absent[0]}")
    description = validate(NetworkFile, _json(files[CONFIG]), source=CONFIG)
    tensors = _tensors(files[WEIGHTS])
    check_finite_weights(tensors, f"{place}/{WEIGHTS}")
    network = build_network(
        description.network,
        num_classes=description.num_classes,
        image_shape=description.image_shape,
        rng=torch.Generator().manual_seed(0),
    )
    # A library's head may lack the bias that a new one has, or the reverse.
    head = nn.utils.skip_init(
        nn.Linear, network.num_features, network.num_classes, bias="head.bias" in tensors
    )
    assert isinstance(head, nn.Linear)
    network.head = head
    _load_tensors(_distinct_tensors(network), tensors)
    return network


def _check_equal(name: str, given: Any, own: Any) -> None:
    if given is not None and given != own:
        raise ConfigError(f"save_network: {name}: the network has {own}, got {given}")


def _distinct_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Returns the live parameters and buffers, a shared one under its first name only."""
    distinct: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        distinct.setdefault(id(tensor), (name, tensor))
    return dict(distinct.values())


def _stored(tensor: Tensor) -> Tensor:
    # A clone, because safetensors rejects tensors that share memory.
    return tensor.detach().cpu().contiguous().clone()


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ConfigError(f"{CONFIG} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{CONFIG}: expected a mapping, got {type(value).__name__}")
    return value


def _tensors(data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{WEIGHTS} is not a complete safetensors file: {error}") from None


def _load_tensors(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    if missing := set(own) - set(saved):
        raise ConfigError(f"{WEIGHTS} lacks {join_names(missing)}, which {CONFIG} requires")
    if extra := set(saved) - set(own):
        raise ConfigError(f"{WEIGHTS} holds {join_names(extra)}, which {CONFIG} does not describe")
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape or not _same_kind(tensor, saved[name]):
            raise ConfigError(
                f"{WEIGHTS}: {name}: expected {_describe(tensor)}, got {_describe(saved[name])}"
            )
    for name, tensor in own.items():
        # Into .data: shared parameters stay shared, and a bfloat16 network is loaded as bfloat16.
        # A clone, because the loaded tensors may be views of the file's bytes.
        tensor.data = saved[name].clone()


def _same_kind(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype or (one.is_floating_point() and other.is_floating_point())


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
