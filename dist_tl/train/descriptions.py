"""What a stored model is, from its configuration and the headers of its tensors.

Covers networks, generators and hubs of dist_tl, and folders of transformers and diffusers. Loads no
weights and downloads nothing.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from dist_tl.config import StrictModel, validate
from dist_tl.contents import split_pin
from dist_tl.errors import ConfigError
from dist_tl.models.adapted import AdaptedConfig
from dist_tl.models.files import NetworkFile
from dist_tl.models.inputs import InputConfig, Normalise
from dist_tl.models.layer_set import LayerSetConfig
from dist_tl.models.networks import AnyNetworkConfig
from dist_tl.models.pretrained import count_parameters, downloaded_folder, saved_statistics
from dist_tl.storage import layout
from dist_tl.storage.model_files import absolute_place
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.hub_model import HUB, read_description

PIPELINE, PIPELINE_PARTS = "model_index.json", ("transformer", "vae")
NOT_HERE = "on the Hugging Face Hub, not downloaded yet"
MAX_REMOTE_BYTES = 2**30  # a remote file is read in whole, so larger models are not counted


class ModelDescription(StrictModel):
    """A model that exists before the run."""

    architecture: str
    num_classes: int | None = None
    image_shape: tuple[int, int, int] | None = Field(
        default=None, description="(channels, height, width) of what it takes or generates."
    )
    inputs: str = Field(default="", description="Preprocessing; empty for a generator.")
    parameters: int | None = Field(default=None, description="Absent: too large to read remotely.")


def describe_model(place: str, inputs: InputConfig | None = None) -> ModelDescription:
    """Describes the model at a folder, a URL, or with a name on the Hugging Face Hub.

    Args:
        inputs: preprocessing that a job gives for a folder of transformers.

    Raises:
        ConfigError: there is no model of a known kind.
    """
    store = _open(place)
    if store is None:
        return ModelDescription(architecture=NOT_HERE)
    if store.exists(HUB):
        return _hub(store)
    if store.exists(PIPELINE):
        return _pipeline(store)
    if not store.exists(layout.MODEL_CONFIG):
        raise ConfigError(f"no model at {store.url}: {layout.MODEL_CONFIG} not found there")
    config = store.read_json(layout.MODEL_CONFIG)
    if "network" in config:
        return _network(store, validate(NetworkFile, config, source=layout.MODEL_CONFIG))
    if "generator" in config:
        return _generator(store, config)
    if "model_type" in config:
        return _transformers(store, config, inputs or InputConfig())
    raise ConfigError(
        f"{store.url}/{layout.MODEL_CONFIG} describes no network, generator or transformers model"
    )


def _open(place: str) -> ObjectStore | None:
    place = split_pin(place)[0]
    folder: Path | None = Path(place).expanduser()
    if absolute_place(place) != place and not folder.is_dir():  # neither a path nor a URL
        folder = downloaded_folder(place)
        return None if folder is None else ObjectStore(folder)
    return ObjectStore(folder if folder.is_dir() else place)


def _network(store: ObjectStore, file: NetworkFile) -> ModelDescription:
    return ModelDescription(
        architecture=_architecture(file.network),
        num_classes=file.num_classes,
        image_shape=file.image_shape,
        inputs=_preprocessing(_inputs_of(file.network)),
        parameters=_parameters(store, [layout.MODEL_TENSORS]),
    )


def _generator(store: ObjectStore, config: dict[str, Any]) -> ModelDescription:
    return ModelDescription(
        architecture=f"{config['generator']['kind']} {config['generator']['channels']}",
        num_classes=config["num_classes"],
        image_shape=config["image_shape"],
        parameters=_parameters(store, [layout.MODEL_TENSORS]),
    )


def _hub(store: ObjectStore) -> ModelDescription:
    hub = read_description(store, ".")
    experts = [
        validate(NetworkFile, store.read_json(f"experts/{name}/config.json"), source=name)
        for name in hub.experts
    ]
    kinds = ", ".join(dict.fromkeys(_architecture(file.network) for file in experts))
    inputs = dict.fromkeys(_preprocessing(_inputs_of(file.network)) for file in experts)
    return ModelDescription(
        architecture=f"hub of {len(experts)} ({kinds}), k = {hub.routes.k} by {hub.routes.by}",
        num_classes=hub.num_classes,
        image_shape=hub.image_shape,
        inputs=" | ".join(inputs),
        parameters=_parameters(store, _tensor_files(store)),
    )


def _pipeline(store: ObjectStore) -> ModelDescription:
    config = store.read_json("transformer/config.json")
    channels, side = config["in_channels"], config["sample_size"]
    if store.exists("vae/config.json"):
        vae = store.read_json("vae/config.json")
        channels = vae["out_channels"]
        side *= 2 ** (len(vae["block_out_channels"]) - 1)
    return ModelDescription(
        architecture=f"pipeline {config.get('_class_name', 'of diffusers')}",
        num_classes=config["num_embeds_ada_norm"],
        image_shape=(channels, side, side),
        parameters=_parameters(store, _tensor_files(store, PIPELINE_PARTS)),
    )


def _transformers(
    store: ObjectStore, config: dict[str, Any], inputs: InputConfig
) -> ModelDescription:
    channels, side = config.get("num_channels", 3), config.get("image_size")
    folder = Path(store.url)
    if inputs.normalise is None and folder.is_dir():
        inputs = inputs.model_copy(update={"normalise": saved_statistics(folder)})
    return ModelDescription(
        architecture=f"transformers {config['model_type']}",
        # The library leaves out its default, two classes.
        num_classes=len(config.get("id2label") or ()) or config.get("num_labels", 2),
        image_shape=(channels, side, side) if isinstance(side, int) else None,
        inputs=_preprocessing([inputs]),
        parameters=_parameters(store, [k for k in _tensor_files(store) if "/" not in k]),
    )


def _architecture(network: AnyNetworkConfig) -> str:
    if isinstance(network, AdaptedConfig):
        return _architecture(network.base)
    if isinstance(network, LayerSetConfig):
        return f"blocks {list(network.blocks)} of {_architecture(network.base)}"
    name = getattr(network, "architecture", None) or getattr(network, "name", None)
    if name is not None:
        return f"{network.kind} {name}"
    own = network.model_dump(exclude={"kind", *InputConfig.model_fields}, exclude_defaults=True)
    return " ".join([network.kind, *(f"{key} {_plain(value)}" for key, value in own.items())])


def _plain(value: object) -> str:
    return str(list(value) if isinstance(value, tuple) else value)


def _inputs_of(network: AnyNetworkConfig) -> list[InputConfig]:
    """Returns the preprocessing steps of a network, in order."""
    if isinstance(network, AdaptedConfig):
        return [network.inputs, *_inputs_of(network.base)]
    if isinstance(network, LayerSetConfig):
        return _inputs_of(network.base)
    return [network] if isinstance(network, InputConfig) else []


def _preprocessing(steps: Sequence[InputConfig]) -> str:
    parts = []
    for step in steps:
        parts += [f"resized to {step.resize} x {step.resize}"] if step.resize else []
        parts += ["grey to RGB"] if step.grey_to_rgb else []
        parts += [_statistics(step.normalise)] if step.normalise else []
    return ", ".join(parts) or "pixels in [-1, 1]"


def _statistics(normalise: Normalise) -> str:
    mean, std = ("/".join(f"{v:.4g}" for v in values) for values in (normalise.mean, normalise.std))
    return f"mean {mean}, std {std}"


def _tensor_files(store: ObjectStore, folders: Sequence[str] = ("",)) -> list[str]:
    """Returns the safetensors files below the folders, without copies in another precision."""
    keys = [key for folder in folders for key in store.list(folder)]
    return [k for k in keys if k.endswith(".safetensors") and "16." not in k]


def _parameters(store: ObjectStore, keys: Sequence[str]) -> int | None:
    local = [Path(store.url) / key for key in keys]
    if "://" not in store.url:
        return sum(map(_count_local, local))
    if sum(store.size(key) for key in keys) > MAX_REMOTE_BYTES:
        return None
    return sum(count_parameters(io.BytesIO(store.read(key))) for key in keys)


def _count_local(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return count_parameters(file)
    except (ConfigError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
