"""Builds, stores and loads hubs of experts.

Every expert and the router are separate networks in separate files, so a process that runs one
expert reads only the files of that expert.
"""

import re
from typing import Annotated, Literal, cast

import safetensors.torch
from pydantic import AfterValidator, Field
from torch import nn

from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError
from dist_tl.methods.hub.pathway import BatchNorm, HubPathway, Preference
from dist_tl.methods.hub.routes import RouteConfig
from dist_tl.models.files import load_network, save_network
from dist_tl.models.finite import check_finite_weights
from dist_tl.models.inputs import ImageShape, InputConfig
from dist_tl.models.networks import (
    Network,
    NetworkConfig,
    behind_inputs,
    build_network,
    on_one_block,
    replace_head,
)
from dist_tl.seeds import torch_rng
from dist_tl.storage.model_files import (
    check_model_files,
    files_fingerprint,
    read_model_files,
    read_named_files,
)
from dist_tl.storage.objects import ObjectStore

HUB, HUB_TENSORS = "hub.json", "hub.safetensors"
_WARM = re.compile(r"(router|aggregator|head|experts\.[^.]+\.head)\.")


def _not_a_torch_attribute(name: str) -> str:
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{name} is an attribute of torch's ModuleDict; use another name")
    return name


ExpertName = Annotated[
    str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$"), AfterValidator(_not_a_torch_attribute)
]


class ExpertSource(StrictModel):
    """A pretrained network of the hub, and its preprocessing."""

    name: ExpertName
    model: str | None = Field(
        default=None, description="Location of the model files: a key of the run, or a URL."
    )
    network: NetworkConfig | None = Field(
        default=None, description="Network of a library, instead of `model`."
    )
    inputs: InputConfig = Field(
        default_factory=InputConfig, description="Preprocessing of the images."
    )
    tap: int | None = Field(
        default=None,
        ge=0,
        description="Block whose pooled output is used; the last features if absent.",
    )


class NewHub(StrictModel):
    """Experts with fresh heads, a fresh router, and the plain sum as initial aggregator."""

    kind: Literal["hub"] = "hub"
    experts: tuple[ExpertSource, ...] = Field(min_length=1)
    router: NetworkConfig = Field(
        description="Trunk of the router; unused if routes do not depend on the input."
    )
    routes: RouteConfig
    batchnorm: BatchNorm = "frozen"
    first_bias: float = Field(default=0.0, description="Initial bias of the first expert's logit.")
    warm: str | None = Field(
        default=None, description="Location of a warm start's router, heads and aggregator."
    )
    num_classes: int = Field(ge=2)


class HubFile(StrictModel):
    """The content of hub.json."""

    experts: tuple[str, ...]
    image_shape: ImageShape
    num_classes: int
    routes: RouteConfig
    batchnorm: BatchNorm


class NewExpert(StrictModel):
    """One expert, with a fresh head."""

    kind: Literal["expert"] = "expert"
    expert: ExpertSource
    warm: str | None = Field(default=None, description="Location of a warm start's head.")
    num_classes: int = Field(ge=2)


def build_hub(
    spec: NewHub, store: ObjectStore, *, image_shape: ImageShape, seed: int
) -> HubPathway:
    """Builds the hub to train; `seed` alone determines its fresh weights.

    Raises:
        ConfigError: an expert is missing, or expects another image shape.
    """
    experts = {
        source.name: build_expert(
            source, store, num_classes=spec.num_classes, image_shape=image_shape, seed=seed
        )
        for source in spec.experts
    }
    hub = HubPathway(
        experts,
        new_router(spec, image_shape, seed),
        num_classes=spec.num_classes,
        routes=spec.routes,
        batchnorm=spec.batchnorm,
    )
    if spec.warm is not None:
        _load_warm_start(hub, store, spec.warm)
    return hub


def build_single(
    spec: NewExpert, store: ObjectStore, *, image_shape: ImageShape, seed: int
) -> Network:
    """Builds one expert to train.

    Raises:
        ConfigError: the expert is missing, or expects another image shape.
    """
    network = build_expert(
        spec.expert, store, num_classes=spec.num_classes, image_shape=image_shape, seed=seed
    )
    if spec.warm is not None:
        _load_warm_start(network, store, spec.warm)
    return network


def head_purpose(name: str) -> str:
    """Returns the seed purpose of an expert's fresh head."""
    return f"fresh head of {name}"


def build_expert(
    source: ExpertSource,
    store: ObjectStore,
    *,
    num_classes: int,
    image_shape: ImageShape,
    seed: int,
) -> Network:
    """Builds a pretrained trunk under a fresh head of `num_classes`.

    Raises:
        ConfigError: files are missing or damaged, or the image shape differs; names the expert.
    """
    rng = torch_rng(seed, head_purpose(source.name))
    try:
        network = _pretrained(source, store, num_classes, image_shape, seed)
        if source.tap is None:
            network = replace_head(network, num_classes, rng)
        else:
            network = on_one_block(network, source.tap, num_classes, rng)
        return behind_inputs(network, source.inputs, image_shape)
    except ConfigError as error:
        raise ConfigError(f"expert {source.name}: {error}") from None


def _pretrained(
    source: ExpertSource, store: ObjectStore, num_classes: int, image_shape: ImageShape, seed: int
) -> Network:
    if (source.model is None) == (source.network is None):
        raise ConfigError("give exactly one of model (stored files) and network (of a library)")
    if source.model is not None:
        return _stored_network(store, source.model)
    assert source.network is not None, "checked above"
    return build_network(
        source.network,
        num_classes=num_classes,
        image_shape=source.inputs.adapted_shape(image_shape),
        rng=torch_rng(seed, f"expert {source.name}"),
    )


def _stored_network(store: ObjectStore, location: str) -> Network:
    return load_network(read_model_files(store, location), place=location)


def new_router(spec: NewHub, image_shape: ImageShape, seed: int) -> nn.Module | None:
    """Builds a router whose initial routes are uniform; None if routes are random."""
    if spec.routes.by == "random":
        return None
    if spec.routes.by == "static":
        router = Preference(len(spec.experts))
        router.logits.data[0] += spec.first_bias
        return router
    # One head computes logits and noise scales; starting at zero, it makes all routes equal.
    router = build_network(
        spec.router,
        num_classes=2 * len(spec.experts),
        image_shape=image_shape,
        rng=torch_rng(seed, "router"),
    )
    nn.init.zeros_(router.head.weight)
    nn.init.zeros_(router.head.bias)
    router.head.bias.data[0] += spec.first_bias
    return router


def hub_files(hub: HubPathway) -> dict[str, bytes]:
    """Returns the files of a hub: file name to bytes."""
    # torch's ModuleDict is not generic; the experts of a stored hub are networks.
    experts = cast(dict[str, Network], dict(hub.experts.items()))
    description = HubFile.model_validate(
        {
            "experts": tuple(experts),
            "image_shape": next(iter(experts.values())).image_shape,
            "num_classes": hub.num_classes,
            "routes": hub.routes,
            "batchnorm": hub.batchnorm,
        }
    )
    files = {HUB: (description.model_dump_json(indent=2) + "\n").encode()}
    for name, expert in experts.items():
        files |= {f"experts/{name}/{k}": v for k, v in save_network(expert).items()}
    if isinstance(hub.router, Network):
        files |= {f"router/{k}": v for k, v in save_network(hub.router).items()}
    return {**files, HUB_TENSORS: _own_tensors(hub)}


def _own_tensors(hub: HubPathway) -> bytes:
    """Returns the tensors of the aggregator, and the preference of a static hub."""
    parts: dict[str, nn.Module] = {"aggregator": hub.aggregator}
    if isinstance(hub.router, Preference):
        parts["router"] = hub.router
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    return safetensors.torch.save(tensors)


def _join(location: str, part: str) -> str:
    # "./part" would be a path relative to the process, not a key of the store.
    return part if location == "." else f"{location}/{part}"


def read_description(store: ObjectStore, location: str) -> HubFile:
    """Reads the description of a stored hub.

    Raises:
        ConfigError: there is no hub at `location`, or its description is damaged.
    """
    data = read_named_files(store, location, [HUB])[HUB]
    try:
        return HubFile.model_validate_json(data)
    except ValueError as error:
        raise ConfigError(f"{location}/{HUB} is damaged or of another version: {error}") from None


def check_hub(store: ObjectStore, location: str) -> HubFile:
    """Reads the description of a stored hub and checks that its files exist; reads no weights.

    Raises:
        ConfigError: there is no hub at `location`, or files are missing.
    """
    description = read_description(store, location)
    parts = [f"experts/{name}" for name in description.experts]
    parts += ["router"] if description.routes.by == "input" else []
    for part in parts:
        check_model_files(store, _join(location, part))
    return description


def hub_fingerprint(store: ObjectStore, location: str) -> str:
    """Returns 16 hexadecimal digits that identify the hub at a location.

    Hashes the description and the aggregator, which differs between trainings: cheap at any size.

    Raises:
        ConfigError: files are missing.
    """
    return files_fingerprint(read_named_files(store, location, [HUB, HUB_TENSORS]))


def load_expert(store: ObjectStore, location: str, name: str) -> Network:
    """Loads one expert of a stored hub, in eval mode; reads no files of other experts.

    Raises:
        ConfigError: files are missing or damaged.
    """
    description = read_description(store, location)
    if name not in description.experts:
        raise ConfigError(
            f"{location} has no expert {name}; it has {', '.join(description.experts)}"
        )
    return _stored_network(store, _join(location, f"experts/{name}")).eval()


class RouterAndAggregator(nn.Module):
    """A hub without its experts.

    Attributes:
        router: maps images to (B, 2M); None if routes are random.
    """

    def __init__(
        self, description: HubFile, router: nn.Module | None, aggregator: nn.Linear
    ) -> None:
        super().__init__()
        self.description, self.router, self.aggregator = description, router, aggregator


def load_router(store: ObjectStore, location: str) -> RouterAndAggregator:
    """Loads router and aggregator of a stored hub, in eval mode; reads no expert.

    Raises:
        ConfigError: files are missing or damaged.
    """
    description = read_description(store, location)
    count = len(description.experts)
    router: nn.Module | None = None
    if description.routes.by == "input":
        router = _stored_network(store, _join(location, "router"))
    elif description.routes.by == "static":
        router = Preference(count)
    parts = RouterAndAggregator(
        description, router, nn.Linear(count * description.num_classes, description.num_classes)
    )
    own = {"aggregator.weight", "aggregator.bias"}
    own |= {"router.logits"} if description.routes.by == "static" else set()
    data = read_named_files(store, location, [HUB_TENSORS])[HUB_TENSORS]
    _load_tensors(parts, data, location, expected=own)
    return parts.eval()


def load_hub(store: ObjectStore, location: str) -> HubPathway:
    """Loads a stored hub, in eval mode.

    Raises:
        ConfigError: files are missing or damaged.
    """
    parts = load_router(store, location)
    hub = HubPathway(
        {name: load_expert(store, location, name) for name in parts.description.experts},
        parts.router,
        num_classes=parts.description.num_classes,
        routes=parts.description.routes,
        batchnorm=parts.description.batchnorm,
    )
    hub.aggregator = parts.aggregator
    return hub.eval()


def _load_warm_start(module: nn.Module, store: ObjectStore, location: str) -> None:
    """Loads heads, and the router and aggregator of a hub, from a warm start."""
    expected = {name for name in module.state_dict() if _WARM.match(name)}
    data = read_named_files(store, location, [HUB_TENSORS])[HUB_TENSORS]
    _load_tensors(module, data, location, expected=expected)


def _load_tensors(module: nn.Module, data: bytes, location: str, *, expected: set[str]) -> None:
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{location}/{HUB_TENSORS} is damaged: {error}") from None
    check_finite_weights(tensors, f"{location}/{HUB_TENSORS}")
    own = module.state_dict(keep_vars=True)
    mismatched = sorted(set(tensors) ^ set(expected))
    mismatched += [
        name for name in set(tensors) & set(own) if tensors[name].shape != own[name].shape
    ]
    if mismatched:
        raise ConfigError(
            f"{location}/{HUB_TENSORS} belongs to another hub: {mismatched[0]} differs"
        )
    for name, tensor in tensors.items():
        own[name].data.copy_(tensor)
