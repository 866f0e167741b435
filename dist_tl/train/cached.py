"""Training on cached features: heads, router and aggregator, without running any expert.

A row is an image and the features that each expert's frozen trunk makes of it, side by side as
float32 numbers. What is learnt goes into the experts afterwards (`NewHub.warm`, `NewExpert.warm`).
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
    """Where an expert's features stand in a row."""

    name: str
    offset: int = Field(ge=0)
    width: int = Field(ge=1)


class CachedExpert(StrictModel):
    """The head of one expert, on cached features."""

    kind: Literal["cached_expert"] = "cached_expert"
    features: CachedFeatures
    num_classes: int = Field(ge=2)


class CachedHub(StrictModel):
    """A whole hub but its trunks, on cached features."""

    kind: Literal["cached_hub"] = "cached_hub"
    hub: NewHub
    features: tuple[CachedFeatures, ...]
    image_shape: ImageShape = Field(description="Of the image that each row begins with.")


class HeadOnRows(nn.Module):
    """Rows (B, D, 1, 1) to logits (B, C) of one expert's part of them."""

    def __init__(self, features: CachedFeatures, head: nn.Linear) -> None:
        super().__init__()
        self.columns = slice(features.offset, features.offset + features.width)
        self.head = head

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(rows.flatten(1)[:, self.columns])

    def to_files(self) -> dict[str, bytes]:
        """What :class:`NewExpert` takes as its warm start."""
        return _file({f"head.{name}": t for name, t in self.head.state_dict().items()})


class RouterOnRows(nn.Module):
    """A router that sees the image at the beginning of each row."""

    def __init__(self, router: nn.Module, image_shape: ImageShape) -> None:
        super().__init__()
        self.router, self.image_shape = router, tuple(image_shape)

    def forward(self, rows: Tensor) -> Tensor:
        channels, height, width = self.image_shape
        flat = rows.flatten(1)[:, : channels * height * width]
        return self.router(flat.reshape(len(rows), channels, height, width))


class HubOnRows(HubPathway):
    """A hub under its warm start."""

    def to_files(self) -> dict[str, bytes]:
        """What :class:`NewHub` takes as its warm start."""
        tensors = {
            name.replace("router.router.", "router.", 1): tensor
            for name, tensor in self.state_dict().items()
        }
        return _file(tensors)


def build_cached_expert(spec: CachedExpert, *, seed: int) -> HeadOnRows:
    """The head that the expert itself would start with."""
    rng = torch_rng(seed, head_purpose(spec.features.name))
    return HeadOnRows(spec.features, fresh_head(spec.features.width, spec.num_classes, rng))


def build_cached_hub(spec: CachedHub, *, seed: int) -> HubOnRows:
    """The heads, router and aggregator that the hub itself would start with."""
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
    whole = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    return {HUB_TENSORS: safetensors.torch.save(whole)}
