"""From an order to its pseudo samples: condition, noise, generator, pixels.

Every draw belongs to a sample's number, so a shard's content does not depend on who makes it.
The generator sees one whole shard's rows in fixed batches: floating-point rounding depends on the
batch, and a retry must give the same bytes.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
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


class ByClass(StrictModel):
    """Uniformly drawn source classes, stored as labels: for pseudo pre-training."""

    kind: Literal["by_class"] = "by_class"


class ByTarget(StrictModel):
    """Conditions drawn from what the source classifier sees in target images: for P-SSL."""

    kind: Literal["by_target"] = "by_target"
    condition: ConditionConfig


class ManifoldTaskConfig(StrictModel):
    """One task of the correlated hidden manifold model in a generator's place."""

    kind: Literal["manifold"] = "manifold"
    model: ManifoldConfig
    role: Literal["source", "target"]
    seed: int = Field(description="Of the pair of tasks.")


AnyGeneratorConfig = Annotated[
    StoredDiffusionConfig | PipelineConfig | ManifoldTaskConfig, Field(discriminator="kind")
]


class GenerateSpec(StrictModel):
    """One stage of pseudo samples: everything that fixes its shards."""

    name: str = Field(description="Of the stage; part of the samples' seeds.")
    seed: int
    generator: AnyGeneratorConfig
    generator_fingerprint: str = Field(description="Of the generator's files and sampler.")
    num_classes: int = Field(ge=2, description="Source classes.")
    image_shape: tuple[int, int, int]
    draw: Annotated[ByClass | ByTarget, Field(discriminator="kind")]
    conditions_fingerprint: str = Field(default="", description="Of the stored conditions, if any.")
    num_samples: int = Field(ge=1)
    batch_size: int = Field(default=256, ge=1, description="Rows the generator sees at once.")
    shards: ShardConfig

    def plan(self) -> ShardPlan:
        """The stage's shards."""
        content = self.model_dump(mode="json", exclude={"shards", "generator", "num_samples"})
        return self.shards.plan(
            stage=self.name,
            purpose=self.name,
            num_samples=self.num_samples,
            seed=self.seed,
            fingerprint=fingerprint(content),
        )

    def manifest(self, created_by: dict[str, str]) -> StageManifest:
        """What the stage says of itself."""
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
    """Store what generators need before the first order: the conditions, then the manifest.

    Raises:
        ConfigError: the stage draws by target images and has no conditions, or holds other samples.
    """
    if isinstance(spec.draw, ByTarget):
        if q_NK is None:
            raise ConfigError(f"stage {spec.name} draws by target images; it needs conditions")
        # Not over another job's conditions: whoever finds a manifest finds its conditions too.
        if read_manifest(store, spec.name) is None:
            store.write(layout.conditions_key(spec.name), conditions_bytes(q_NK))
    return open_stage(store, spec.manifest(created_by))


def conditions_bytes(q_NK: Tensor) -> bytes:
    """The stored form of (N, K) float32 conditions."""
    return save_tensors({"q": q_NK.contiguous()})


def read_conditions(store: ObjectStore, spec: GenerateSpec) -> Tensor | None:
    """The stage's (N, K) conditions; None where it draws by class."""
    if not isinstance(spec.draw, ByTarget):
        return None
    return load_tensors(store.read(layout.conditions_key(spec.name)))["q"]


def draw_samples(
    order: ShardOrder, spec: GenerateSpec, generator: ConditionalGenerator, q_NK: Tensor | None
) -> Iterator[PseudoSample]:
    """The samples of one order, in order of their numbers.

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
    # A picture is stored as pixels; the inputs of a manifold task are numbers, kept as they are.
    stored = as_inputs if isinstance(spec.generator, ManifoldTaskConfig) else quantise
    pixels = stored(images.float().cpu(), numbers=numbers)
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
    assert q_NK is not None, "open_generate_stage stores the conditions first"
    drawn = draw_conditions(
        q_NK,
        spec.draw.condition,
        run_seed=order.seed,
        purpose=order.purpose,
        sample_indices=numbers,
    )
    return drawn.condition_SK, None, drawn.row_S


def open_generator(store: ObjectStore, config: AnyGeneratorConfig) -> ConditionalGenerator:
    """The generator a job names, frozen, on the GPU where there is one.

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
    """What stands for the generator in orders and manifests: its settings, and own weights."""
    settings = fingerprint(config.model_dump(mode="json", exclude={"path"}))
    if not isinstance(config, StoredDiffusionConfig):
        return fingerprint(config)
    return f"{settings[:8]}{files_fingerprint(read_model_files(store, config.path))}"
