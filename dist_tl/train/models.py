"""Builds the initial model of a stage, and reads and writes model files."""

from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import nn

from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError
from dist_tl.methods.hub.pathway import HubPathway
from dist_tl.models.files import load_network, save_network
from dist_tl.models.generators.diffusion import ClassDiffusion, DiffusionConfig
from dist_tl.models.networks import Network, NetworkConfig, build_network, replace_head
from dist_tl.seeds import torch_rng
from dist_tl.storage.model_files import read_model_files
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.cached import (
    CachedExpert,
    CachedHub,
    build_cached_expert,
    build_cached_hub,
)
from dist_tl.train.hub_model import NewExpert, NewHub, build_hub, build_single, hub_files

ImageShape = tuple[int, int, int]


class NewNetwork(StrictModel):
    """A network with fresh weights."""

    kind: Literal["new"] = "new"
    network: NetworkConfig
    num_classes: int = Field(ge=2)


class PretrainedTrunk(StrictModel):
    """A pretrained trunk, with unchanged weights, under a fresh head."""

    kind: Literal["pretrained_trunk"] = "pretrained_trunk"
    model: str = Field(description="Location of the model files: a key of the run, or a URL.")
    num_classes: int = Field(ge=2)


class Readout(StrictModel):
    """A frozen trunk under a trainable head without bias that starts at zero."""

    kind: Literal["readout"] = "readout"
    trunk: Annotated[NewNetwork | PretrainedTrunk, Field(discriminator="kind")]

    @property
    def num_classes(self) -> int:
        """Output width of the head."""
        return self.trunk.num_classes


class NewGenerator(StrictModel):
    """A class-conditional diffusion model with fresh weights."""

    kind: Literal["generator"] = "generator"
    generator: DiffusionConfig
    num_classes: int = Field(ge=2)


ModelSpec = Annotated[
    NewNetwork
    | PretrainedTrunk
    | Readout
    | NewGenerator
    | NewExpert
    | NewHub
    | CachedExpert
    | CachedHub,
    Field(discriminator="kind"),
]


def build_model(
    spec: ModelSpec, store: ObjectStore, *, image_shape: ImageShape, seed: int
) -> nn.Module:
    """Builds the module to train; `seed` alone determines its fresh weights.

    Raises:
        ConfigError: the model files are missing, or expect another image shape.
    """
    match spec:
        case NewNetwork():
            return build_network(
                spec.network,
                num_classes=spec.num_classes,
                image_shape=image_shape,
                rng=torch_rng(seed, "initial weights"),
            )
        case NewGenerator():
            return ClassDiffusion(
                spec.generator,
                num_classes=spec.num_classes,
                image_shape=image_shape,
                rng=torch_rng(seed, "initial weights"),
            )
        case PretrainedTrunk():
            network = load_classifier(store, spec.model, image_shape=image_shape)
            return replace_head(network, spec.num_classes, torch_rng(seed, "fresh head"))
        case NewExpert():
            return build_single(spec, store, image_shape=image_shape, seed=seed)
        case NewHub():
            return build_hub(spec, store, image_shape=image_shape, seed=seed)
        case CachedExpert():
            return build_cached_expert(spec, seed=seed)
        case CachedHub():
            return build_cached_hub(spec, seed=seed)
        case Readout():
            network = build_model(spec.trunk, store, image_shape=image_shape, seed=seed)
            assert isinstance(network, Network), "both kinds of trunk are networks"
            return _with_readout(network)


def _with_readout(network: Network) -> Network:
    network.head = nn.Linear(network.num_features, network.num_classes, bias=False)
    nn.init.zeros_(network.head.weight)
    network.trunk.requires_grad_(False)
    return network


def load_classifier(
    store: ObjectStore, location: str, *, image_shape: ImageShape | None = None
) -> Network:
    """Loads a trained network, in training mode.

    Raises:
        ConfigError: files are missing or damaged, or the network expects another image shape.
    """
    network = load_network(read_model_files(store, location), place=location)
    if image_shape is not None and network.image_shape != tuple(image_shape):
        raise ConfigError(
            f"the model at {location} takes images of (channels, height, width) "
            f"{network.image_shape}, the data has {tuple(image_shape)}; set the data's size and "
            "channels to the model's"
        )
    return network


@runtime_checkable
class _WritesFiles(Protocol):
    def to_files(self) -> dict[str, bytes]: ...


def model_files(module: nn.Module) -> dict[str, bytes]:
    """Returns the files of a trained module: file name to bytes."""
    if isinstance(module, Network):
        return save_network(module)
    if isinstance(module, _WritesFiles):
        return module.to_files()
    assert isinstance(module, HubPathway), "all other modules have to_files"
    return hub_files(module)


def load_weights(module: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """Copies weights and buffers (`Engine.full_weights`) into `module`; frozen, in eval mode.

    Raises:
        ValueError: the weights belong to another module.
    """
    # A state_dict names shared weights twice and omits non-persistent buffers.
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if differing := sorted(own.keys() ^ weights.keys()):
        raise ValueError(f"expected the weights of this module; only one side has {differing[0]}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    return module.eval().requires_grad_(False)
