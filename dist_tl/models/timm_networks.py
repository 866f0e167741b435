"""Image classifiers of the optional timm library, split into a trunk and a linear head."""

from types import ModuleType
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dist_tl.errors import ConfigError
from dist_tl.models.finite import check_finite_weights
from dist_tl.models.inputs import ImageShape, InputAdapter, InputConfig, Normalise
from dist_tl.models.messages import check_name, one_line
from dist_tl.models.taps import detach_head

# Set by dist_tl, or options that load other weights (checkpoint_path reads pickles).
_RESERVED = {
    *("cache_dir", "checkpoint_path", "in_chans", "num_classes", "pretrained", "pretrained_cfg"),
    *("pretrained_cfg_overlay", "scriptable"),
}


class TimmConfig(InputConfig):
    """An image classifier of the timm library. Needs timm and a torchvision that matches torch."""

    kind: Literal["timm"]
    name: str = Field(description='A name from timm.list_models(), e.g. "resnet18".')
    pretrained: bool = Field(
        default=False, description="Start from timm's pretrained weights for that name."
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of timm.create_model, e.g. {img_size: 32, drop_rate: 0.1}.",
    )

    @model_validator(mode="after")
    def _no_reserved_options(self) -> Self:
        if reserved := sorted(_RESERVED & set(self.config)):
            raise ValueError(f"config must not set {', '.join(reserved)}: dist_tl sets them itself")
        return self


class TimmTrunk(nn.Module):
    """Maps images (N, C, H, W) in [-1, 1] to the inputs (N, D) of the classifier's head."""

    def __init__(self, inputs: InputAdapter, model: nn.Module) -> None:
        super().__init__()
        self.inputs = inputs
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.inputs(images))


def build_timm(
    config: TimmConfig, *, num_classes: int, image_shape: ImageShape
) -> tuple[TimmTrunk, nn.Linear, TimmConfig]:
    """Builds or downloads a classifier of the timm library.

    Draws initial weights from torch's global generator, which the caller seeds and restores.

    Returns:
        The trunk, the head, and a config that rebuilds both without a download.

    Raises:
        ConfigError: timm or torchvision is missing or broken, the name is unknown, an option or
            the images do not fit, the weights are not finite, or the head is not linear.
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
    if config.pretrained:
        check_finite_weights(model.state_dict(), f"timm: {config.name}")
    if config.pretrained and config.normalise is None:
        config = config.model_copy(update={"normalise": _statistics(model, shape[0])})
    _, head = detach_head(model, model, torch.zeros(1, *shape), name=f"timm: {config.name}")
    resolved = config.model_copy(update={"pretrained": False})
    return TimmTrunk(InputAdapter(config), model), head, resolved


def _import_timm() -> ModuleType:
    # Not only ImportError: a torchvision built for another torch raises RuntimeError.
    try:
        import timm  # pyright: ignore[reportMissingImports]  # optional dependency
    except Exception as error:
        raise ConfigError(
            f"kind timm: importing timm fails: {one_line(error)}. Install it with pip install "
            "'dist_tl[timm]' torchvision, with the torchvision version that matches your torch, "
            "or use kind resnet or transformers"
        ) from error
    return timm


def _statistics(model: Any, num_channels: int) -> Normalise | None:
    """Returns mean and std of pretrained weights, averaged if the images have fewer channels."""
    mean, std = (tuple(model.pretrained_cfg.get(key) or ()) for key in ("mean", "std"))
    if not mean or not std:
        return None
    if len(mean) != num_channels:
        mean, std = ((sum(values) / len(values),) for values in (mean, std))
    return Normalise(mean=mean, std=std)
