"""Image classifiers of the timm library, which is optional, as a trunk and a linear head."""

from types import ModuleType
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dist_tl.errors import ConfigError
from dist_tl.models.inputs import ImageShape, InputAdapter, InputConfig, Normalise
from dist_tl.models.taps import detach_head
from dist_tl.models.wording import check_name, one_line

# Set by us, or a way to weights from elsewhere (checkpoint_path reads pickles).
_RESERVED = {
    *("cache_dir", "checkpoint_path", "in_chans", "num_classes", "pretrained", "pretrained_cfg"),
    *("pretrained_cfg_overlay", "scriptable"),
}


class TimmConfig(InputConfig):
    """An image classifier of the timm library. Needs timm and a torchvision that matches torch."""

    kind: Literal["timm"]
    name: str = Field(description='A name from timm.list_models(), e.g. "resnet18".')
    pretrained: bool = Field(
        default=False, description="Start from the weights timm has for that name."
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of timm.create_model, e.g. {img_size: 32, drop_rate: 0.1}.",
    )

    @model_validator(mode="after")
    def _leave_weights_alone(self) -> Self:
        if reserved := sorted(_RESERVED & set(self.config)):
            raise ValueError(f"config must not set {', '.join(reserved)}: dist_tl sets them itself")
        return self


class TimmTrunk(nn.Module):
    """Images (N, C, H, W) in [-1, 1] to the vectors (N, D) that the classifier's head was given."""

    def __init__(self, inputs: InputAdapter, model: nn.Module) -> None:
        super().__init__()
        self.inputs = inputs
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.inputs(images))


def build_timm(
    config: TimmConfig, *, num_classes: int, image_shape: ImageShape
) -> tuple[TimmTrunk, nn.Linear, TimmConfig]:
    """Trunk, head, and a config that rebuilds both without a download.

    Draws initial weights from torch's global generator: the caller seeds it and puts it back.

    Raises:
        ConfigError: timm or torchvision is missing or broken, the name is unknown, an option or
            the images do not fit, the head is not linear.
    """
    timm = _import_timm()
    check_name("timm: name", config.name.partition(".")[0], timm.list_models())
    shape = config.adapted_shape(image_shape)
    try:
        model = timm.create_model(
            config.name,
            pretrained=config.pretrained,
            num_classes=num_classes,
            in_chans=shape[0],
            **config.config,
        )
    except Exception as error:
        raise ConfigError(
            f"timm: {config.name} cannot be built or loaded: {one_line(error)}"
        ) from error
    if config.pretrained and config.normalise is None:
        config = config.model_copy(update={"normalise": _statistics(model, shape[0])})
    _, head = detach_head(model, model, torch.zeros(1, *shape), name=f"timm: {config.name}")
    resolved = config.model_copy(update={"pretrained": False})
    return TimmTrunk(InputAdapter(config), model), head, resolved


def _import_timm() -> ModuleType:
    # Not only ImportError: a torchvision made for another torch raises RuntimeError.
    try:
        import timm
    except Exception as error:
        raise ConfigError(
            f"kind timm: importing timm fails: {one_line(error)}. Install it with pip install "
            "'dist_tl[timm]' torchvision, torchvision in the version that matches your torch; or "
            "use kind resnet or transformers"
        ) from error
    return timm


def _statistics(model: Any, num_channels: int) -> Normalise | None:
    """Mean and std of the pretrained weights, averaged where the images have fewer channels."""
    mean, std = (tuple(model.pretrained_cfg.get(key) or ()) for key in ("mean", "std"))
    if not mean or not std:
        return None
    if len(mean) != num_channels:
        mean, std = ((sum(values) / len(values),) for values in (mean, std))
    return Normalise(mean=mean, std=std)
