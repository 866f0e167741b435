"""One hidden layer on flat inputs: the student of the correlated hidden manifold model.

features = activation(W x / sqrt(D)), W (K, D) with entries N(0, 1) at the start and no biases, so
that a layer is of the same size whatever its width (Gerace et al., arXiv:2106.05418, section 2).
Its inputs are taken as they come: no channels, no normalisation.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_tl.config import StrictModel
from dist_tl.models.inputs import ImageShape

_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "erf": torch.erf}


class PerceptronConfig(StrictModel):
    """A network with one hidden layer."""

    kind: Literal["perceptron"] = "perceptron"
    hidden: int = Field(default=200, ge=1, le=100_000, description="Hidden units, K.")
    activation: Literal["tanh", "relu", "erf"] = Field(
        default="tanh", description="Of the hidden units."
    )


class HiddenLayer(nn.Module):
    """Inputs (N, C, H, W), flattened to D numbers each, to hidden units (N, K)."""

    def __init__(self, config: PerceptronConfig, image_shape: ImageShape) -> None:
        super().__init__()
        num_inputs = math.prod(image_shape)
        self.weight = nn.Parameter(torch.randn(config.hidden, num_inputs))
        self.scale = 1 / math.sqrt(num_inputs)
        self.activation = config.activation

    def forward(self, images: Tensor) -> Tensor:
        return _ACTIVATIONS[self.activation](images.flatten(1) @ self.weight.t() * self.scale)
