"""Image classifiers of the transformers library, split into a trunk and a linear head.

Weights come from safetensors only, code from the installed library only. transformers is imported
only when a network is built: the import is slow and fails if torchvision does not match torch.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dist_tl.config import NamesModel
from dist_tl.errors import ConfigError
from dist_tl.models.inputs import ImageShape, InputAdapter, InputConfig
from dist_tl.models.messages import check_name, join_names, one_line
from dist_tl.models.pretrained import local_folder, saved_statistics
from dist_tl.models.taps import detach_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# These do not map images to logits through one linear layer, or load other code or weights.
_UNUSABLE = {"imagegpt", "perceiver", "shieldgemma2", "timm_wrapper"}
# Set by dist_tl, specific to one version or machine, or stored elsewhere.
_NOT_ARCHITECTURE = {
    *("_name_or_path", "architectures", "dtype", "id2label", "label2id", "model_type"),
    *("num_labels", "output_attentions", "output_hidden_states", "problem_type", "return_dict"),
    *("torch_dtype", "transformers_version"),
}


class TransformersConfig(InputConfig):
    """An image classifier of the transformers library, randomly initialised or pretrained."""

    kind: Literal["transformers"]
    architecture: str | None = Field(
        default=None,
        description='Model type for random initial weights, e.g. "resnet", "convnextv2", "vit".',
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the architecture's transformers config class. num_channels and "
        "image_size default to those of the images.",
    )
    path: Annotated[str, NamesModel()] | None = Field(
        default=None,
        description="Local folder, or name on the Hugging Face Hub, of a classifier saved by "
        "save_pretrained.",
    )
    head: Literal["keep", "fresh"] = Field(
        default="keep",
        description="With path: keep the saved head, whose number of classes must be that of the "
        "task, or replace it by a new one.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.architecture is None) == (self.path is None):
            raise ValueError(
                "give exactly one of architecture (random initial weights) and path (saved weights)"
            )
        if self.path is not None and self.config:
            raise ValueError("config belongs to architecture; a path has its own config")
        return self


class TransformersTrunk(nn.Module):
    """Maps images (N, C, H, W) in [-1, 1] to the inputs (N, D) of the classifier's head."""

    def __init__(self, inputs: InputAdapter, model: nn.Module) -> None:
        super().__init__()
        self.inputs = inputs
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.inputs(images)).logits


def build_transformers(
    config: TransformersConfig, *, num_classes: int, image_shape: ImageShape
) -> tuple[TransformersTrunk, nn.Linear | None, TransformersConfig]:
    """Builds or loads a classifier of the transformers library.

    Draws initial weights from torch's global generator, which the caller seeds and restores.

    Returns:
        The trunk, the head (None if a new one is needed), and a config that rebuilds both without
        the path.

    Raises:
        ConfigError: unknown architecture or option, nothing loadable at the path, images of the
            wrong size or channels, or a head that is not linear or has other classes.
    """
    if config.path is None:
        name = str(config.architecture)
        shape = config.adapted_shape(image_shape)
        with _readable_errors(name):
            model = _new_model(config, num_classes, shape)
        missing: list[str] = []
    else:
        name, folder = config.path, local_folder(config.path)
        with _readable_errors(name):
            model, missing = _saved_model(folder)
        config = config.model_copy(
            update={"normalise": config.normalise or saved_statistics(folder)}
        )
    return _split(config, model, missing, name, num_classes, image_shape)


def _split(
    config: TransformersConfig,
    model: "PreTrainedModel",
    missing: list[str],
    name: str,
    num_classes: int,
    image_shape: ImageShape,
) -> tuple[TransformersTrunk, nn.Linear | None, TransformersConfig]:
    shape = config.adapted_shape(image_shape)
    expected = getattr(model.config, "num_channels", shape[0])
    if expected != shape[0]:
        raise ConfigError(
            f"{name} expects images of {expected} channels, got {shape[0]}; "
            + ("set grey_to_rgb: true" if shape[0] == 1 else f"load images of {expected} channels")
        )
    path, head = detach_head(model, lambda x: model(x).logits, torch.zeros(1, *shape), name=name)
    if absent := [key for key in missing if not key.startswith(f"{path}.")]:
        raise ConfigError(
            f"{name}: the saved weights lack {join_names(absent)}; save the whole model"
        )
    kept = None if config.head == "fresh" else head
    if kept is not None and (missing or head.out_features != num_classes):
        saved = "no head" if missing else f"a head of {head.out_features} classes"
        raise ConfigError(
            f"{name} has {saved}, expected {num_classes} classes; set head: fresh to replace it"
        )
    resolved = config.model_copy(
        update={
            "architecture": model.config.model_type,
            "config": _architecture_options(model.config),
            "path": None,
            "head": "keep",
        }
    )
    return TransformersTrunk(InputAdapter(config), model), kept, resolved


@contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    """Raises errors of transformers about a model as a ConfigError with a remedy."""
    try:
        yield
    except ConfigError:
        raise
    except ImportError as error:
        raise ConfigError(
            f"{name}: transformers cannot import it: {one_line(error)}. A torchvision that does "
            "not match torch also breaks transformers: uninstall it or install a matching version"
        ) from error
    except Exception as error:
        raise ConfigError(f"{name} cannot be built or loaded: {one_line(error)}") from error


def _classifier_class(architecture: str) -> str:
    names = _mapping()[architecture]
    return names if isinstance(names, str) else names[0]


def _new_model(
    config: TransformersConfig, num_classes: int, shape: ImageShape
) -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModelForImageClassification

    architecture = str(config.architecture)
    check_name("architecture", architecture, _architectures())
    known = AutoConfig.for_model(architecture).to_dict()
    for key in config.config:
        check_name(f"{architecture}: option", key, set(known) - _NOT_ARCHITECTURE)
    channels, height, width = shape
    takes_one_side = height == width and isinstance(known.get("image_size"), int)
    size = height if takes_one_side else [height, width]
    from_images = {"num_channels": channels, "image_size": size}
    options = {key: value for key, value in from_images.items() if key in known} | config.config
    resolved = AutoConfig.for_model(architecture, **options, num_labels=num_classes)
    # Selects one of the architecture's classifiers if it has several.
    resolved.architectures = [_classifier_class(architecture)]
    return AutoModelForImageClassification.from_config(resolved, dtype=torch.float32)


def _saved_model(folder: Path) -> "tuple[PreTrainedModel, list[str]]":
    from transformers import AutoConfig, AutoModelForImageClassification

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    check_name("architecture", config.model_type, _architectures())
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{folder}: quantised weights cannot be trained; save the model in float32"
        )
    # A saved config may name an attention kernel to download from the hub: torch's is used instead.
    config._attn_implementation = None
    with _no_progress_bar():
        model, report = AutoModelForImageClassification.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    return model, sorted(report["missing_keys"])


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _mapping() -> Mapping[str, str | tuple[str, ...]]:
    from transformers.models.auto import modeling_auto

    return dict(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items())


def _architectures() -> set[str]:
    return set(_mapping()) - _UNUSABLE


def _architecture_options(config: Any) -> dict[str, Any]:
    """Returns the JSON options that rebuild a transformers config, defaults included."""
    options = json.loads(json.dumps(config.to_dict()))
    return {key: value for key, value in options.items() if key not in _NOT_ARCHITECTURE}
