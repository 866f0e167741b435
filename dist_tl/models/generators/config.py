"""Configuration and loading of the generator of a job.

Not covered: training a generator (`diffusion.DiffusionConfig`), and reading its files from a store,
which the caller does.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from dist_tl.config import NamesModel, StrictModel, validate
from dist_tl.errors import ConfigError
from dist_tl.models.generators.diffusion import ClassDiffusion, DiffusionConfig
from dist_tl.models.generators.pipelines import PipelineConfig, PipelineGenerator


class StoredDiffusionConfig(StrictModel):
    """A `ClassDiffusion` trained by an earlier job."""

    kind: Literal["diffusion"] = "diffusion"
    path: Annotated[str, NamesModel()] = Field(
        min_length=1, description="Folder or URL with model.safetensors and config.json."
    )
    guidance_scale: float | None = Field(
        default=None, ge=0.0, description="Replaces the saved guidance scale."
    )
    num_steps: int | None = Field(
        default=None, ge=1, le=500, description="Replaces the saved number of steps."
    )


GeneratorConfig = Annotated[StoredDiffusionConfig | PipelineConfig, Field(discriminator="kind")]


def load_generator(
    config: StoredDiffusionConfig | PipelineConfig, *, files: Mapping[str, bytes] | None = None
) -> ClassDiffusion | PipelineGenerator:
    """Loads the configured generator: frozen, in eval mode, on the CPU.

    Args:
        files: the files at `config.path`, file name to content, for kind "diffusion". A pipeline
            is read from its folder or the hub instead.

    Raises:
        ConfigError: files are missing or unreadable, or are not a class-conditional generator.
    """
    if isinstance(config, PipelineConfig):
        return PipelineGenerator.load(config)
    if files is None:
        raise ConfigError(f"generator {config.path}: expected its files, got none")
    generator = ClassDiffusion.from_files(files)
    changes = config.model_dump(include={"guidance_scale", "num_steps"}, exclude_none=True)
    # Validated again: a generator that never learnt "no class" cannot be guided.
    settings = generator.config.model_dump() | changes
    generator.config = validate(DiffusionConfig, settings, source=f"generator {config.path}")
    return generator.requires_grad_(False)
