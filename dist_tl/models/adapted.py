"""A network behind preprocessing of its own, so that images of another kind can be given to it."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from dist_tl.config import StrictModel
from dist_tl.models.hugging_face import TransformersConfig
from dist_tl.models.inputs import InputAdapter, InputConfig
from dist_tl.models.layer_set import LayerSetConfig
from dist_tl.models.perceptron import PerceptronConfig
from dist_tl.models.resnet import ResNetConfig
from dist_tl.models.timm_networks import TimmConfig

AdaptableConfig = Annotated[
    ResNetConfig | TransformersConfig | TimmConfig | PerceptronConfig | LayerSetConfig,
    Field(discriminator="kind"),
]


class AdaptedConfig(StrictModel):
    """A network for images that are resized, coloured or normalised first."""

    kind: Literal["adapted"] = "adapted"
    base: AdaptableConfig
    inputs: InputConfig


class AdaptedTrunk(nn.Module):
    """Images (N, C, H, W) in [-1, 1] to the base's features (N, D) of the adapted images."""

    def __init__(self, config: AdaptedConfig, base: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.adapter = InputAdapter(config.inputs)
        self.base = base

    def forward(self, images: Tensor) -> Tensor:
        return self.base(self.adapter(images))
