"""One hidden layer on flat inputs: the student of the correlated hidden manifold model.

features = activation(W x / sqrt(D)), W (K, D) with initial entries N(0, 1) and no biases, so that
the scale of a layer does not depend on its width (Gerace et al., arXiv:2106.05418, section 2).
Inputs are used as they are: no channels, no normalisation.
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
    hidden: int = Field(default=200, ge=1, le=100_000, description="Number of hidden units, K.")
    activation: Literal["tanh", "relu", "erf"] = Field(
        default="tanh", description="Activation of the hidden units."
    )


class HiddenLayer(nn.Module):
    """Maps inputs (N, C, H, W), flattened to D numbers each, to hidden units (N, K)."""

    def __init__(self, config: PerceptronConfig, image_shape: ImageShape) -> None:
        super().__init__()
        num_inputs = math.prod(image_shape)
        self.weight = nn.Parameter(torch.randn(config.hidden, num_inputs))
        self.scale = 1 / math.sqrt(num_inputs)
        self.activation = config.activation

    def forward(self, images: Tensor) -> Tensor:
        return _ACTIVATIONS[self.activation](images.flatten(1) @ self.weight.t() * self.scale)
