"""Published class-conditional pipelines (DiT) as generators that accept any condition.

Every block of a diffusers DiT looks up the embedding of an integer label. Here the lookups also
accept rows of weights over all labels, so that a condition selects a mixture of embeddings, and
"no class" is the model's own last row (diffusers' pipeline hard-codes ImageNet's 1000).

Only JSON and safetensors files are downloaded or read, never a pickle and never code.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv:2212.09748.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_tl.config import NamesModel, StrictModel
from dist_tl.errors import ConfigError
from dist_tl.models.generators.protocol import (
    check_condition,
    check_finite,
    check_labels,
    check_rng,
)
from dist_tl.models.generators.sampling import draw_noise, guide, make_solver, solve
from dist_tl.models.messages import one_line

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

Model = TypeVar("Model", bound="ModelMixin")

_FILES = ("*.json", "*.safetensors")
# Older repositories use the name of the class that DiT was split from.
_DIT_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
_SCHEDULE_OPTIONS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PipelineConfig(StrictModel):
    """A saved DiT pipeline and its sampling options."""

    kind: Literal["pipeline"] = "pipeline"
    path: Annotated[str, NamesModel()] = Field(
        min_length=1, description="Folder written by save_pretrained, or name of a hub model."
    )
    revision: str | None = Field(default=None, description="Commit or tag of a hub model.")
    guidance_scale: float = Field(
        default=1.5,
        ge=0.0,
        description="1: conditional sampling at half the cost; larger values: closer to the class, "
        "less diverse.",
    )
    num_steps: int = Field(default=25, ge=1, le=500, description="Network evaluations per image.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Precision of the transformer; images are decoded in float32.",
    )


class PipelineGenerator(nn.Module):
    """A `ConditionalGenerator` made of a DiT, an optional VAE, and a deterministic solver.

    Frozen and in eval mode. `to` moves it to a device.

    Args:
        config: sampling options; its path is not used.
        transformer: its label lookups are replaced in place by ones that accept mixtures.
        vae: decodes latents; None if the transformer works on pixels.
        noise_schedule: the saved configuration of the pipeline's scheduler.

    Raises:
        ConfigError: the transformer has no row for "no class" or an unexpected number of output
            channels, or the solver does not support the schedule.
    """

    def __init__(
        self,
        config: PipelineConfig,
        transformer: "DiTTransformer2DModel",
        vae: "AutoencoderKL | None",
        noise_schedule: dict[str, Any],
    ) -> None:
        super().__init__()
        self.config = config
        self.transformer = transformer
        self.vae = vae
        self._noise_schedule = _supported_schedule(noise_schedule)
        _check_channels(transformer)
        self.num_classes = int(transformer.config["num_embeds_ada_norm"])
        _accept_mixtures(transformer, self.num_classes)
        side = transformer.config["sample_size"]
        self.latent_shape = (transformer.config["in_channels"], side, side)
        self.image_shape = (
            self.latent_shape if vae is None else _decoded_shape(self.latent_shape, vae)
        )
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, config: PipelineConfig) -> "PipelineGenerator":
        """Loads the generator saved at `config.path`.

        Raises:
            ConfigError: the path does not exist, is not a class-conditional DiT pipeline, or a
                part has no safetensors file or lacks weights.
        """
        # Imported late: the import takes seconds, and planning a job does not need it.
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

        folder = _local_folder(config)
        parts = _read_json(folder / "model_index.json")
        if _class_of(parts, "transformer") not in _DIT_CLASSES:
            raise ConfigError(
                f"{config.path}: expected a class-conditional pipeline with a DiT transformer, got "
                f"{parts.get('_class_name', 'no pipeline')} with {_named_parts(parts)}"
            )
        transformer = _load_part(
            DiTTransformer2DModel, folder, "transformer", _DTYPES[config.dtype]
        )
        vae = None
        if _class_of(parts, "vae") is not None:
            vae = _load_part(AutoencoderKL, folder, "vae", torch.float32)
        return cls(config, transformer, vae, _read_json(folder / "scheduler/scheduler_config.json"))

    def sample(self, condition: Tensor, *, rng: Sequence[torch.Generator]) -> Tensor:
        """Generates one image per row of `condition`; see `ConditionalGenerator.sample`.

        Costs `num_steps` evaluations of the transformer, twice as many with guidance, and one
        decoding.
        """
        check_condition(condition, self.num_classes)
        # The last column is "no class", which has weight 0 in a condition.
        rows = nn.functional.pad(condition, (0, 1)).to(self.transformer.device)
        null = torch.zeros_like(rows[:1])
        null[:, -1] = 1.0
        return self._sample(rows, null, rng).to(condition.device)

    def sample_classes(self, labels: Tensor, *, rng: Sequence[torch.Generator]) -> Tensor:
        """Generates one image per integer label, identical to `sample` of one-hot rows.

        Raises:
            ValueError: labels out of range or not (N,) int64, or another number of generators.
            NumericsError: as for `sample`.
        """
        check_labels(labels, self.num_classes)
        rows = labels.to(self.transformer.device)
        return self._sample(rows, rows.new_full((1,), self.num_classes), rng).to(labels.device)

    @torch.no_grad()
    def _sample(self, labels: Tensor, null: Tensor, rng: Sequence[torch.Generator]) -> Tensor:
        check_rng(rng, len(labels))
        if len(labels) == 0:
            return torch.empty(0, *self.image_shape)
        latents = solve(
            guide(self._predict, self.config.guidance_scale, null),
            labels,
            draw_noise(rng, self.latent_shape, labels.device),
            solver=make_solver(self._noise_schedule, clip=self.vae is None),
            num_steps=self.config.num_steps,
        )
        return self._decode(latents)

    def _predict(self, noisy: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        output = self.transformer(
            noisy.to(self.transformer.dtype),
            timestep=timesteps,
            class_labels=labels,
            return_dict=False,
        )[0]
        # A DiT with learnt variances returns them in a second set of channels.
        return output[:, : self.latent_shape[0]].float()

    def _decode(self, latents: Tensor) -> Tensor:
        if self.vae is None:
            return latents.clamp(-1.0, 1.0)
        config = self.vae.config
        latents = latents / config["scaling_factor"] + (config["shift_factor"] or 0.0)
        # diffusers annotates `z` with the legacy class FloatTensor, which no tensor belongs to.
        images = self.vae.decode(latents, return_dict=False)[0]  # pyright: ignore[reportArgumentType]
        check_finite(images.isfinite().flatten(1).all(dim=1))
        return images.clamp(-1.0, 1.0)


class _MixedLabelEmbedding(nn.Module):
    """A label lookup that also accepts rows of weights over all labels, including "no class"."""

    def __init__(self, embedding_table: nn.Embedding) -> None:
        super().__init__()
        self.embedding_table = embedding_table

    def forward(self, labels: Tensor) -> Tensor:
        if not labels.is_floating_point():
            return self.embedding_table(labels)
        table = self.embedding_table.weight
        # In float32, so that low precision rounds only the mixture, not its weights too.
        return (labels @ table.float()).to(table.dtype)


def _check_channels(transformer: "DiTTransformer2DModel") -> None:
    inputs, outputs = transformer.config["in_channels"], transformer.out_channels
    if outputs not in (inputs, 2 * inputs):
        raise ConfigError(
            f"transformer: expected {inputs} output channels, or {2 * inputs} with learnt "
            f"variances, got {outputs}"
        )


def _accept_mixtures(transformer: "DiTTransformer2DModel", num_classes: int) -> None:
    for block in transformer.transformer_blocks:
        embedding = block.get_submodule("norm1.emb")
        table = embedding.get_submodule("class_embedder.embedding_table")
        assert isinstance(table, nn.Embedding)
        if table.num_embeddings != num_classes + 1:
            raise ConfigError(
                f"expected {num_classes} classes and one row for 'no class', got an embedding of "
                f"{table.num_embeddings} rows"
            )
        embedding.class_embedder = _MixedLabelEmbedding(table)


def _supported_schedule(saved: dict[str, Any]) -> dict[str, Any]:
    """Returns the noise schedule of a saved scheduler, for any compatible solver."""
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    supported = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    if saved.get("_class_name") not in supported:
        raise ConfigError(
            f"scheduler: expected one of {', '.join(supported)}, got {saved.get('_class_name')!r}"
        )
    return {name: saved[name] for name in _SCHEDULE_OPTIONS if saved.get(name) is not None}


def _decoded_shape(latent_shape: tuple[int, ...], vae: "AutoencoderKL") -> tuple[int, int, int]:
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    return (vae.config["out_channels"], latent_shape[1] * factor, latent_shape[2] * factor)


def _local_folder(config: PipelineConfig) -> Path:
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(config.path, revision=config.revision, allow_patterns=list(_FILES))
        )
    except Exception as error:
        raise ConfigError(
            f"{config.path} is neither a local folder nor a pipeline that can be downloaded from "
            f"the hub: {one_line(error)}"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing; expected a folder from save_pretrained") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: expected a mapping, got {type(value).__name__}")
    return value


def _class_of(parts: dict[str, Any], name: str) -> str | None:
    """Returns the class of a part in a pipeline's index, where it is [library, class]."""
    entry = parts.get(name)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _named_parts(parts: dict[str, Any]) -> str:
    names = [f"{name} {_class_of(parts, name)}" for name in sorted(parts) if _class_of(parts, name)]
    return ", ".join(names) or "no parts"


def _load_part(kind: type[Model], folder: Path, name: str, dtype: torch.dtype) -> Model:
    try:
        # Library models draw initial weights from the global generator before loading the saved
        # ones; the generator's state must not change.
        with torch.random.fork_rng(devices=[]):
            loaded = kind.from_pretrained(
                str(folder),
                subfolder=name,
                use_safetensors=True,
                local_files_only=True,
                torch_dtype=dtype,
                output_loading_info=True,
                low_cpu_mem_usage=False,  # True requires accelerate
            )
    except Exception as error:
        raise ConfigError(
            f"{folder}/{name} cannot be loaded from safetensors: {one_line(error)}; save it with "
            "save_pretrained(safe_serialization=True)"
        ) from error
    # diffusers annotates from_pretrained without output_loading_info, which adds the second item.
    model, info = cast("tuple[Model, dict[str, list]]", loaded)
    # The library only warns about missing weights and keeps random ones.
    if missing := info["missing_keys"] or info["mismatched_keys"]:
        raise ConfigError(f"{folder}/{name} lacks weights, e.g. {sorted(map(str, missing))[0]}")
    return model
