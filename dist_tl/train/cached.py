"""Trains heads, router and aggregator on cached features, without running the experts.

A row holds an image and the features of each expert's frozen trunk, concatenated as float32. The
trained weights initialise a hub or an expert afterwards (`NewHub.warm`, `NewExpert.warm`).
"""

from typing import Literal

import safetensors.torch
from pydantic import Field
from torch import Tensor, nn

from dist_tl.config import StrictModel
from dist_tl.methods.hub.pathway import HubPathway
from dist_tl.models.inputs import ImageShape
from dist_tl.models.networks import fresh_head
from dist_tl.seeds import torch_rng
from dist_tl.train.hub_model import HUB_TENSORS, NewHub, head_purpose, new_router


class CachedFeatures(StrictModel):
    """The columns of an expert's features in a row."""

    name: str
    offset: int = Field(ge=0)
    width: int = Field(ge=1)


class CachedExpert(StrictModel):
    """The head of one expert, on cached features."""

    kind: Literal["cached_expert"] = "cached_expert"
    features: CachedFeatures
    num_classes: int = Field(ge=2)


class CachedHub(StrictModel):
    """A hub without its trunks, on cached features."""

    kind: Literal["cached_hub"] = "cached_hub"
    hub: NewHub
    features: tuple[CachedFeatures, ...]
    image_shape: ImageShape = Field(description="Shape of the image at the start of each row.")


class HeadOnRows(nn.Module):
    """Maps rows (B, D, 1, 1) to the logits (B, C) of one expert."""

    def __init__(self, features: CachedFeatures, head: nn.Linear) -> None:
        super().__init__()
        self.columns = slice(features.offset, features.offset + features.width)
        self.head = head

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(rows.flatten(1)[:, self.columns])

    def to_files(self) -> dict[str, bytes]:
        """Returns the warm-start file of :class:`NewExpert`."""
        return _file({f"head.{name}": t for name, t in self.head.state_dict().items()})


class RouterOnRows(nn.Module):
    """A router on the image at the start of each row."""

    def __init__(self, router: nn.Module, image_shape: ImageShape) -> None:
        super().__init__()
        self.router, self.image_shape = router, tuple(image_shape)

    def forward(self, rows: Tensor) -> Tensor:
        channels, height, width = self.image_shape
        flat = rows.flatten(1)[:, : channels * height * width]
        return self.router(flat.reshape(len(rows), channels, height, width))


class HubOnRows(HubPathway):
    """A hub on cached features."""

    def to_files(self) -> dict[str, bytes]:
        """Returns the warm-start file of :class:`NewHub`."""
        tensors = {
            name.replace("router.router.", "router.", 1): tensor
            for name, tensor in self.state_dict().items()
        }
        return _file(tensors)


def build_cached_expert(spec: CachedExpert, *, seed: int) -> HeadOnRows:
    """Builds the head with the expert's own initial weights."""
    rng = torch_rng(seed, head_purpose(spec.features.name))
    return HeadOnRows(spec.features, fresh_head(spec.features.width, spec.num_classes, rng))


def build_cached_hub(spec: CachedHub, *, seed: int) -> HubOnRows:
    """Builds heads, router and aggregator with the hub's own initial weights."""
    heads = {
        features.name: build_cached_expert(
            CachedExpert(features=features, num_classes=spec.hub.num_classes), seed=seed
        )
        for features in spec.features
    }
    router = new_router(spec.hub, spec.image_shape, seed)
    return HubOnRows(
        heads,
        None if router is None else RouterOnRows(router, spec.image_shape),
        num_classes=spec.hub.num_classes,
        routes=spec.hub.routes,
    )


def _file(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    return {HUB_TENSORS: safetensors.torch.save(copies)}
