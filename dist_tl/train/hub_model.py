"""A hub as a model under training: put together from its experts, written, read again.

Every expert and the router stay networks of their own, in files of their own, so that a process
which runs one expert reads that one only.
"""

import re
from typing import Annotated, Literal

import safetensors.torch
from pydantic import AfterValidator, Field
from torch import nn

from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError
from dist_tl.methods.hub.pathway import BatchNorm, HubPathway, Preference
from dist_tl.methods.hub.routes import RouteConfig
from dist_tl.models.files import load_network, save_network
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


def _free_in_torch(name: str) -> str:
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{name} is a word that torch keeps for itself; use another name")
    return name


ExpertName = Annotated[
    str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$"), AfterValidator(_free_in_torch)
]


class ExpertSource(StrictModel):
    """A pre-trained network of the hub, and how it is used."""

    name: ExpertName
    model: str | None = Field(
        default=None, description="Where its files are: a key of the run, or a URL."
    )
    network: NetworkConfig | None = Field(
        default=None, description="Or what a library loads it from."
    )
    inputs: InputConfig = Field(
        default_factory=InputConfig, description="What is done to images before it sees them."
    )
    tap: int | None = Field(
        default=None,
        ge=0,
        description="Block whose pooled output is used; absent: the last features.",
    )


class NewHub(StrictModel):
    """Experts with fresh heads, a fresh router and the plain sum as aggregator."""

    kind: Literal["hub"] = "hub"
    experts: tuple[ExpertSource, ...] = Field(min_length=1)
    router: NetworkConfig = Field(description="Its trunk; not used where routes are no choice.")
    routes: RouteConfig
    batchnorm: BatchNorm = "frozen"
    first_bias: float = Field(
        default=0.0, description="Added to the first expert's logit at the start."
    )
    warm: str | None = Field(
        default=None, description="Where a warm start's router, heads and aggregator are."
    )
    num_classes: int = Field(ge=2)


class HubFile(StrictModel):
    """What hub.json holds."""

    experts: tuple[str, ...]
    image_shape: ImageShape
    num_classes: int
    routes: RouteConfig
    batchnorm: BatchNorm


class NewExpert(StrictModel):
    """One expert alone, with a fresh head."""

    kind: Literal["expert"] = "expert"
    expert: ExpertSource
    warm: str | None = Field(default=None, description="Where the head of a warm start is.")
    num_classes: int = Field(ge=2)


def build_hub(
    spec: NewHub, store: ObjectStore, *, image_shape: ImageShape, seed: int
) -> HubPathway:
    """The hub to train; its fresh weights follow from `seed` alone.

    Raises:
        ConfigError: an expert is missing, or does not take such images.
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
        _warm_up(hub, store, spec.warm)
    return hub


def build_single(
    spec: NewExpert, store: ObjectStore, *, image_shape: ImageShape, seed: int
) -> Network:
    """One expert to train by itself.

    Raises:
        ConfigError: it is missing, or does not take such images.
    """
    network = build_expert(
        spec.expert, store, num_classes=spec.num_classes, image_shape=image_shape, seed=seed
    )
    if spec.warm is not None:
        _warm_up(network, store, spec.warm)
    return network


def head_purpose(name: str) -> str:
    """What the draw of an expert's fresh head is for."""
    return f"fresh head of {name}"


def build_expert(
    source: ExpertSource,
    store: ObjectStore,
    *,
    num_classes: int,
    image_shape: ImageShape,
    seed: int,
) -> Network:
    """A pre-trained trunk under a fresh head of `num_classes`.

    Raises:
        ConfigError: its files are missing or damaged, or it takes other images; names the expert.
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
        raise ConfigError("give exactly one of model (files of ours) and network (of a library)")
    if source.model is not None:
        return load_network(read_model_files(store, source.model))
    return build_network(
        source.network,
        num_classes=num_classes,
        image_shape=source.inputs.adapted_shape(image_shape),
        rng=torch_rng(seed, f"expert {source.name}"),
    )


def new_router(spec: NewHub, image_shape: ImageShape, seed: int) -> nn.Module | None:
    """A router whose routes are all even at the start; None where chance decides."""
    if spec.routes.by == "random":
        return None
    if spec.routes.by == "static":
        router = Preference(len(spec.experts))
        router.logits.data[0] += spec.first_bias
        return router
    # Logits and noise scales come out of one head that starts at zero: every route is even then.
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
    """The files that stand for a hub: file name to bytes."""
    experts: dict[str, Network] = dict(hub.experts.items())
    description = HubFile(
        experts=tuple(experts),
        image_shape=next(iter(experts.values())).image_shape,
        num_classes=hub.num_classes,
        routes=hub.routes,
        batchnorm=hub.batchnorm,
    )
    files = {HUB: (description.model_dump_json(indent=2) + "\n").encode()}
    for name, expert in experts.items():
        files |= {f"experts/{name}/{k}": v for k, v in save_network(expert).items()}
    if isinstance(hub.router, Network):
        files |= {f"router/{k}": v for k, v in save_network(hub.router).items()}
    return {**files, HUB_TENSORS: _own_tensors(hub)}


def _own_tensors(hub: HubPathway) -> bytes:
    """The aggregator, and the preference of a static hub."""
    parts = {"aggregator": hub.aggregator}
    if isinstance(hub.router, Preference):
        parts["router"] = hub.router
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    return safetensors.torch.save(tensors)


def _below(place: str, part: str) -> str:
    # Not "./part", which would be a path of the process and not of the store.
    return part if place == "." else f"{place}/{part}"


def read_description(store: ObjectStore, place: str) -> HubFile:
    """What a stored hub consists of.

    Raises:
        ConfigError: there is no hub at `place`.
    """
    data = read_named_files(store, place, [HUB])[HUB]
    try:
        return HubFile.model_validate_json(data)
    except ValueError as error:
        raise ConfigError(f"{place}/{HUB} is damaged, or of another version: {error}") from None


def check_hub(store: ObjectStore, place: str) -> HubFile:
    """What a stored hub consists of, all files being there; reads none of the weights.

    Raises:
        ConfigError: there is no hub at `place`, or files of it are missing.
    """
    about = read_description(store, place)
    parts = [f"experts/{name}" for name in about.experts]
    parts += ["router"] if about.routes.by == "input" else []
    for part in parts:
        check_model_files(store, _below(place, part))
    return about


def hub_fingerprint(store: ObjectStore, place: str) -> str:
    """16 hexadecimal digits that another hub at the same place would not have.

    From what it consists of and its aggregator, which no two trainings share: cheap for any size.

    Raises:
        ConfigError: files are missing.
    """
    return files_fingerprint(read_named_files(store, place, [HUB, HUB_TENSORS]))


def load_expert(store: ObjectStore, place: str, name: str) -> Network:
    """One expert of a stored hub, in evaluation mode; reads no other's files.

    Raises:
        ConfigError: files are missing or damaged.
    """
    about = read_description(store, place)
    if name not in about.experts:
        raise ConfigError(f"{place} has no expert {name}; it has {', '.join(about.experts)}")
    return load_network(read_model_files(store, _below(place, f"experts/{name}"))).eval()


class RouterAndAggregator(nn.Module):
    """What of a hub is not its experts.

    Attributes:
        router: images to (B, 2M); None where chance decides.
    """

    def __init__(self, about: HubFile, router: nn.Module | None, aggregator: nn.Linear) -> None:
        super().__init__()
        self.about, self.router, self.aggregator = about, router, aggregator


def load_router(store: ObjectStore, place: str) -> RouterAndAggregator:
    """The router and the aggregator of a stored hub, in evaluation mode; reads no expert.

    Raises:
        ConfigError: files are missing or damaged.
    """
    about = read_description(store, place)
    count = len(about.experts)
    router: nn.Module | None = None
    if about.routes.by == "input":
        router = load_network(read_model_files(store, _below(place, "router")))
    elif about.routes.by == "static":
        router = Preference(count)
    parts = RouterAndAggregator(
        about, router, nn.Linear(count * about.num_classes, about.num_classes)
    )
    own = {"aggregator.weight", "aggregator.bias"}
    own |= {"router.logits"} if about.routes.by == "static" else set()
    data = read_named_files(store, place, [HUB_TENSORS])[HUB_TENSORS]
    _take(parts, data, place, expected=own)
    return parts.eval()


def load_hub(store: ObjectStore, place: str) -> HubPathway:
    """A stored hub in evaluation mode.

    Raises:
        ConfigError: files are missing or damaged.
    """
    rest = load_router(store, place)
    hub = HubPathway(
        {name: load_expert(store, place, name) for name in rest.about.experts},
        rest.router,
        num_classes=rest.about.num_classes,
        routes=rest.about.routes,
        batchnorm=rest.about.batchnorm,
    )
    hub.aggregator = rest.aggregator
    return hub.eval()


def _warm_up(module: nn.Module, store: ObjectStore, place: str) -> None:
    """Take heads, and a hub's router and aggregator, from a warm start."""
    expected = {name for name in module.state_dict() if _WARM.match(name)}
    data = read_named_files(store, place, [HUB_TENSORS])[HUB_TENSORS]
    _take(module, data, place, expected=expected)


def _take(module: nn.Module, data: bytes, place: str, *, expected: set[str]) -> None:
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{place}/{HUB_TENSORS} is damaged: {error}") from None
    own = module.state_dict(keep_vars=True)
    wrong = sorted(set(tensors) ^ set(expected))
    wrong += [name for name in set(tensors) & set(own) if tensors[name].shape != own[name].shape]
    if wrong:
        raise ConfigError(f"{place}/{HUB_TENSORS} belongs to another hub: {wrong[0]} differs")
    for name, tensor in tensors.items():
        own[name].data.copy_(tensor)
