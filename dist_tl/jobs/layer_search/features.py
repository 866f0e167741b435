"""Ray tasks of a layer search that come first: unit vectors of all layers for all images.

Features are computed once; an episode then needs inner products only.
"""

import time
from functools import lru_cache

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from dist_tl.config import StrictModel
from dist_tl.datasets.spec import DataConfig
from dist_tl.datasets.views import Views
from dist_tl.methods.layer_search.features import PoolingConfig, layer_vectors
from dist_tl.seeds import torch_rng
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.models import load_classifier
from dist_tl.train.rows import RowsSpec, load_rows

BATCH = 256


class FeaturesInputs(StrictModel):
    """Unit vectors of all layers for some rows of a data set."""

    model: str
    data: DataConfig
    pooling: PoolingConfig
    first: int
    last: int
    key: str = Field(description="Where the vectors are stored.")
    view: int | None = Field(
        default=None, description="Of a weak view of the images, by its number."
    )
    seed: int = Field(default=0, description="Of the views.")


class FeaturesOutput(StrictModel):
    """What was stored."""

    widths: tuple[int, ...] = Field(description="Of every layer, the penultimate last.")
    zeros: int = Field(description="Zero vectors, over all layers.")
    seconds: float


class FeatureFiles(StrictModel):
    """Stored features of a whole data set."""

    data: DataConfig
    keys: tuple[str, ...] = Field(description="In the order of the rows.")


@torch.no_grad()
def compute_features(inputs: FeaturesInputs, store: ObjectStore) -> FeaturesOutput:
    """One forward pass an image gives the vectors of all layers."""
    began = time.monotonic()
    rows = load_rows(RowsSpec(data=inputs.data))
    network = load_classifier(store, inputs.model, image_shape=rows.image_shape).eval()
    parts = []
    for start in range(inputs.first, inputs.last, BATCH):
        images = rows.tensor(np.arange(start, min(start + BATCH, inputs.last)))
        if inputs.view is not None:
            images = _viewed(images, inputs, start)
        parts.append(layer_vectors(network.blocks(images), inputs.pooling))
    layers = [torch.cat(columns) for columns in zip(*parts, strict=True)]
    store.write(inputs.key, save_tensors({f"{i:04d}": v for i, v in enumerate(layers)}))
    return FeaturesOutput(
        widths=tuple(v.shape[1] for v in layers),
        zeros=sum(int((v == 0).all(dim=1).sum()) for v in layers),
        seconds=time.monotonic() - began,
    )


def _viewed(images: Tensor, inputs: FeaturesInputs, start: int) -> Tensor:
    """A weak view of each image; its draws belong to the row, not to the batch."""
    views = Views(inputs.data.views)
    rows = range(start, start + len(images))
    rngs = [torch_rng(inputs.seed, "augmented view", inputs.view, row) for row in rows]
    return torch.cat([views.weak(images[i : i + 1], rng) for i, rng in enumerate(rngs)])


# A worker runs many batches of episodes over the same features.
@lru_cache(maxsize=8)
def read_features(url: str, keys: tuple[str, ...]) -> tuple[Tensor, ...]:
    """The (N, D) float64 unit vectors of every layer, from a store at `url`."""
    store = ObjectStore(url)
    parts = [load_tensors(store.read(key)) for key in keys]
    names = sorted(parts[0])
    # In float64 once, not once an episode.
    return tuple(torch.cat([part[name] for part in parts]).double() for name in names)
