"""Published class-conditional pipelines (DiT) as generators that accept any condition.

A diffusers DiT looks up one embedding for each integer label, in every block. Here the lookups
also take rows of weights over all labels, so that a condition enters as a mixture of embeddings,
and "no class" is the model's own last row (diffusers' pipeline has ImageNet's 1000 written in).

Only JSON and safetensors files are fetched or read, never a pickle and never code.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv:2212.09748.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError
from dist_tl.models.generators.protocol import (
    check_condition,
    check_finite,
    check_labels,
    check_rng,
)
from dist_tl.models.generators.sampling import draw_noise, guide, make_solver, solve
from dist_tl.models.wording import one_line

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiTTransformer2DModel, ModelMixin

_FILES = ("*.json", "*.safetensors")
# Older repositories name the transformer by the class that DiT was split from.
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
    """A saved DiT pipeline and how to sample from it."""

    kind: Literal["pipeline"] = "pipeline"
    path: str = Field(
        min_length=1, description="Folder written by save_pretrained, or the name of a hub model."
    )
    revision: str | None = Field(default=None, description="Commit or tag, for hub models.")
    guidance_scale: float = Field(
        default=1.5,
        ge=0.0,
        description="1: conditional sampling, half the cost; above: closer to the class, less "
        "diverse.",
    )
    num_steps: int = Field(
        default=25, ge=1, le=500, description="Network evaluations for each image."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Precision of the transformer; images are decoded in float32.",
    )


class PipelineGenerator(nn.Module):
    """A `ConditionalGenerator` made of a DiT, perhaps a VAE, and a deterministic solver.

    Frozen and in eval mode. `to` moves it to a device.

    Args:
        config: sampling options; its path has been read already.
        transformer: its label lookups are replaced in place by ones that also take mixtures.
        vae: decodes latents; None where the transformer works on pixels.
        noise_schedule: the saved configuration of the pipeline's scheduler.

    Raises:
        ConfigError: the transformer has no row for "no class" or an odd number of output
            channels, or the schedule is of a kind that the solver does not know.
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
        self._noise_schedule = _known_schedule(noise_schedule)
        _check_channels(transformer)
        self.num_classes = int(transformer.config.num_embeds_ada_norm)
        _accept_mixtures(transformer, self.num_classes)
        self.latent_shape = (transformer.config.in_channels, *[transformer.config.sample_size] * 2)
        self.image_shape = (
            self.latent_shape if vae is None else _decoded_shape(self.latent_shape, vae)
        )
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, config: PipelineConfig) -> "PipelineGenerator":
        """The generator saved at `config.path`.

        Raises:
            ConfigError: nothing is there, it is not a class-conditional DiT pipeline, a part has
                no safetensors file, or weights are missing from it.
        """
        # Imported late: the library takes seconds to come up, and a plan needs none of it.
        from diffusers import AutoencoderKL, DiTTransformer2DModel

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
        """One image for each row of `condition`; see `ConditionalGenerator.sample`.

        The cost is `num_steps` evaluations of the transformer, twice that with guidance, and one
        decoding.
        """
        check_condition(condition, self.num_classes)
        # The last column is "no class", which a condition gives no weight to.
        rows = nn.functional.pad(condition, (0, 1)).to(self.transformer.device)
        null = torch.zeros_like(rows[:1])
        null[:, -1] = 1.0
        return self._sample(rows, null, rng).to(condition.device)

    def sample_classes(self, labels: Tensor, *, rng: Sequence[torch.Generator]) -> Tensor:
        """One image for each integer label; equals `sample` of their one-hot rows exactly.

        Raises:
            ValueError: labels out of range or not (N,) int64, or not one generator for each.
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
        # A DiT that has learnt variances gives them in a second set of channels.
        return output[:, : self.latent_shape[0]].float()

    def _decode(self, latents: Tensor) -> Tensor:
        if self.vae is None:
            return latents.clamp(-1.0, 1.0)
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        images = self.vae.decode(latents, return_dict=False)[0]
        check_finite(images.isfinite().flatten(1).all(dim=1))
        return images.clamp(-1.0, 1.0)


class _MixedLabelEmbedding(nn.Module):
    """A label lookup that also takes rows of weights over all labels, "no class" included."""

    def __init__(self, embedding_table: nn.Embedding) -> None:
        super().__init__()
        self.embedding_table = embedding_table

    def forward(self, labels: Tensor) -> Tensor:
        if not labels.is_floating_point():
            return self.embedding_table(labels)
        table = self.embedding_table.weight
        # In float32, so that a narrow weight type rounds the mixture once, not its weights too.
        return (labels @ table.float()).to(table.dtype)


def _check_channels(transformer: "DiTTransformer2DModel") -> None:
    taken, given = transformer.config.in_channels, transformer.out_channels
    if given not in (taken, 2 * taken):
        raise ConfigError(
            f"transformer: expected {taken} output channels, or {2 * taken} with learnt variances, "
            f"got {given}"
        )


def _accept_mixtures(transformer: "DiTTransformer2DModel", num_classes: int) -> None:
    for block in transformer.transformer_blocks:
        embedding = block.norm1.emb
        table = embedding.class_embedder.embedding_table
        if table.num_embeddings != num_classes + 1:
            raise ConfigError(
                f"expected {num_classes} classes and one row for 'no class', got a table of "
                f"{table.num_embeddings} rows"
            )
        embedding.class_embedder = _MixedLabelEmbedding(table)


def _known_schedule(saved: dict[str, Any]) -> dict[str, Any]:
    """What a saved scheduler says of the noise, whichever solver it belongs to."""
    from diffusers.schedulers import KarrasDiffusionSchedulers

    known = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    if saved.get("_class_name") not in known:
        raise ConfigError(
            f"scheduler: expected one of {', '.join(known)}, got {saved.get('_class_name')!r}"
        )
    return {name: saved[name] for name in _SCHEDULE_OPTIONS if saved.get(name) is not None}


def _decoded_shape(latent_shape: tuple[int, ...], vae: "AutoencoderKL") -> tuple[int, int, int]:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return (vae.config.out_channels, latent_shape[1] * factor, latent_shape[2] * factor)


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
            f"{config.path} is neither a folder here nor a pipeline that the hub would give us: "
            f"{one_line(error)}"
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
    """The class that a pipeline's index gives for one of its parts, as [library, class]."""
    entry = parts.get(name)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _named_parts(parts: dict[str, Any]) -> str:
    names = [f"{name} {_class_of(parts, name)}" for name in sorted(parts) if _class_of(parts, name)]
    return ", ".join(names) or "no parts"


def _load_part(kind: "type[ModelMixin]", folder: Path, name: str, dtype: torch.dtype) -> Any:
    try:
        # Library models draw their initial weights, before loading over them, from the global
        # generator; it must come out as it went in.
        with torch.random.fork_rng(devices=[]):
            model, info = kind.from_pretrained(
                str(folder),
                subfolder=name,
                use_safetensors=True,
                local_files_only=True,
                torch_dtype=dtype,
                output_loading_info=True,
                low_cpu_mem_usage=False,  # the other way needs a package that we do not ask for
            )
    except Exception as error:
        raise ConfigError(
            f"{folder}/{name} cannot be loaded from safetensors: {one_line(error)}; save it with "
            "save_pretrained(safe_serialization=True)"
        ) from error
    # The library would only warn, and leave random weights in place.
    if missing := info["missing_keys"] or info["mismatched_keys"]:
        raise ConfigError(f"{folder}/{name} lacks weights, e.g. {sorted(map(str, missing))[0]}")
    return model
