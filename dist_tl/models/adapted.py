"""A network with its own preprocessing, for images of another size or channel count."""

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
    """A base network and the resizing, channel repetition and normalisation before it."""

    kind: Literal["adapted"] = "adapted"
    base: AdaptableConfig
    inputs: InputConfig


class AdaptedTrunk(nn.Module):
    """Maps images (N, C, H, W) in [-1, 1] to the base's features (N, D) after preprocessing."""

    def __init__(self, config: AdaptedConfig, base: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.adapter = InputAdapter(config.inputs)
        self.base = base

    def forward(self, images: Tensor) -> Tensor:
        return self.base(self.adapter(images))
