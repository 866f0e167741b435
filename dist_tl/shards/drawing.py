"""Generates the pseudo samples of a shard order: condition, noise, generator, pixels.

All random draws are seeded by the sample's number, so a shard's content does not depend on the
worker. The generator processes the rows of one shard in fixed batches: floating-point rounding
depends on the batch, and a retry must produce the same bytes.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_tl.config import StrictModel, fingerprint
from dist_tl.errors import ConfigError
from dist_tl.methods.hidden_manifold.sampling import (
    ManifoldConfig,
    ManifoldGenerator,
    draw_tasks,
)
from dist_tl.methods.pseudo.conditions import (
    ConditionConfig,
    draw_classes,
    draw_conditions,
    one_hot,
)
from dist_tl.models.generators.config import (
    StoredDiffusionConfig,
    load_generator,
)
from dist_tl.models.generators.pipelines import PipelineConfig
from dist_tl.models.generators.protocol import ConditionalGenerator, check_condition
from dist_tl.seeds import row_rngs
from dist_tl.shards.manifest import StageManifest, open_stage, read_manifest
from dist_tl.shards.order import ShardOrder, ShardPlan
from dist_tl.shards.sample import PseudoSample, as_inputs, quantise
from dist_tl.shards.writer import ShardConfig
from dist_tl.storage import layout
from dist_tl.storage.model_files import files_fingerprint, read_model_files
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.tensors import read_tensors, write_tensors


class ByClass(StrictModel):
    """Draws source classes uniformly and stores them as labels (pseudo pre-training)."""

    kind: Literal["by_class"] = "by_class"


class ByTarget(StrictModel):
    """Draws conditions from the source classifier's output on target images (P-SSL)."""

    kind: Literal["by_target"] = "by_target"
    condition: ConditionConfig


class ManifoldTaskConfig(StrictModel):
    """Uses a task of the correlated hidden manifold model as the generator."""

    kind: Literal["manifold"] = "manifold"
    model: ManifoldConfig
    role: Literal["source", "target"]
    seed: int = Field(description="Seed of the pair of tasks.")


AnyGeneratorConfig = Annotated[
    StoredDiffusionConfig | PipelineConfig | ManifoldTaskConfig, Field(discriminator="kind")
]


class GenerateSpec(StrictModel):
    """Specification of one stage of pseudo samples; determines its shards."""

    name: str = Field(description="Name of the stage; part of the samples' seeds.")
    seed: int
    generator: AnyGeneratorConfig
    generator_fingerprint: str = Field(
        description="Fingerprint of the generator's files and sampler settings."
    )
    num_classes: int = Field(ge=2, description="Number of source classes.")
    image_shape: tuple[int, int, int]
    draw: Annotated[ByClass | ByTarget, Field(discriminator="kind")]
    conditions_fingerprint: str = Field(
        default="", description="Fingerprint of the stored conditions, if any."
    )
    num_samples: int = Field(ge=1)
    batch_size: int = Field(default=256, ge=1, description="Batch size of the generator.")
    shards: ShardConfig

    def plan(self) -> ShardPlan:
        """Returns the plan of the stage's shards."""
        content = self.model_dump(mode="json", exclude={"shards", "generator", "num_samples"})
        return self.shards.plan(
            stage=self.name,
            purpose=self.name,
            num_samples=self.num_samples,
            seed=self.seed,
            fingerprint=fingerprint(content),
        )

    def manifest(self, created_by: dict[str, str]) -> StageManifest:
        """Returns the manifest of the stage."""
        by_target = isinstance(self.draw, ByTarget)
        return StageManifest(
            plan=self.plan(),
            kind="p_ssl" if by_target else "pp",
            condition=self.draw.condition.kind if isinstance(self.draw, ByTarget) else "uniform",
            image_shape=self.image_shape,
            num_classes=self.num_classes,
            generator=self.generator_fingerprint,
            created_by=created_by,
        )


def open_generate_stage(
    store: ObjectStore, spec: GenerateSpec, q_NK: Tensor | None, *, created_by: dict[str, str]
) -> StageManifest:
    """Writes the inputs of the generators: the conditions, then the manifest.

    Raises:
        ConfigError: a stage with `ByTarget` has no conditions, or the stage holds other samples.
    """
    if isinstance(spec.draw, ByTarget):
        if q_NK is None:
            raise ConfigError(f"stage {spec.name} draws by target images and needs conditions")
        # Never overwrites another job's conditions: they exist if the manifest does.
        if read_manifest(store, spec.name) is None:
            write_tensors(store, layout.conditions_key(spec.name), {"q": q_NK.contiguous()})
    return open_stage(store, spec.manifest(created_by))


def read_conditions(store: ObjectStore, spec: GenerateSpec) -> Tensor | None:
    """Returns the stage's (N, K) conditions, or None if it draws by class.

    Raises:
        DamagedError: they are missing or altered.
    """
    if not isinstance(spec.draw, ByTarget):
        return None
    return read_tensors(store, layout.conditions_key(spec.name))["q"]


def draw_samples(
    order: ShardOrder, spec: GenerateSpec, generator: ConditionalGenerator, q_NK: Tensor | None
) -> Iterator[PseudoSample]:
    """Yields the samples of one order, sorted by number.

    Raises:
        ConfigError: a condition is not on the simplex.
        NumericsError: a pixel is not finite; the message names the sample.
    """
    numbers = order.numbers
    for start in range(0, len(numbers), spec.batch_size):
        yield from _draw_batch(
            numbers[start : start + spec.batch_size], order, spec, generator, q_NK
        )


def _draw_batch(
    numbers: Sequence[int],
    order: ShardOrder,
    spec: GenerateSpec,
    generator: ConditionalGenerator,
    q_NK: Tensor | None,
) -> Iterator[PseudoSample]:
    condition_SK, label_S, row_S = _conditions(numbers, order, spec, q_NK)
    check_condition(condition_SK, spec.num_classes)
    noise = row_rngs(order.seed, f"{order.purpose} noise", numbers)
    with torch.no_grad():
        images = generator.sample(condition_SK, rng=noise)
    # Images are stored as uint8 pixels; the inputs of a manifold task are stored unrounded.
    to_stored = as_inputs if isinstance(spec.generator, ManifoldTaskConfig) else quantise
    pixels = to_stored(images.float().cpu(), numbers=numbers)
    for i, number in enumerate(numbers):
        provenance: dict[str, Any] = {"stage": spec.name, "generator": spec.generator_fingerprint}
        if row_S is not None:
            provenance["target_row"] = int(row_S[i])
        yield PseudoSample(
            number=number,
            image=pixels[i],
            label=None if label_S is None else int(label_S[i]),
            soft=None if label_S is not None else condition_SK[i].numpy(),
            provenance=provenance,
        )


def _conditions(
    numbers: Sequence[int], order: ShardOrder, spec: GenerateSpec, q_NK: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if isinstance(spec.draw, ByClass):
        label_S = draw_classes(spec.num_classes, order.seed, order.purpose, numbers)
        return one_hot(label_S, spec.num_classes), label_S, None
    assert q_NK is not None, "open_generate_stage requires conditions"
    drawn = draw_conditions(
        q_NK,
        spec.draw.condition,
        run_seed=order.seed,
        purpose=order.purpose,
        sample_indices=numbers,
    )
    return drawn.condition_SK, None, drawn.row_S


def open_generator(store: ObjectStore, config: AnyGeneratorConfig) -> ConditionalGenerator:
    """Loads the generator of a job, frozen, on the GPU if there is one.

    Raises:
        ConfigError: it is missing, damaged, or not class-conditional.
    """
    if isinstance(config, ManifoldTaskConfig):
        tasks = draw_tasks(config.model, seed=config.seed)
        return ManifoldGenerator(tasks.source if config.role == "source" else tasks.target)
    stored = isinstance(config, StoredDiffusionConfig)
    files = read_model_files(store, config.path) if stored else None
    generator = load_generator(config, files=files)
    return generator.to("cuda" if torch.cuda.is_available() else "cpu")


def generator_fingerprint(store: ObjectStore, config: AnyGeneratorConfig) -> str:
    """Returns a fingerprint of the generator's settings and, if stored here, its weights."""
    settings = fingerprint(config.model_dump(mode="json", exclude={"path"}))
    if not isinstance(config, StoredDiffusionConfig):
        return fingerprint(config)
    return f"{settings[:8]}{files_fingerprint(read_model_files(store, config.path))}"
