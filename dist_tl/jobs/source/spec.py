"""The specification of a job of kind `source`, and of the source of a transfer job."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from dist_tl.config import StrictModel
from dist_tl.datasets.spec import DataConfig
from dist_tl.datasets.views import ViewsConfig
from dist_tl.jobs.spec import BudgetConfig, ModelPlace, TrainingJobConfig
from dist_tl.models.generators.config import GeneratorConfig, StoredDiffusionConfig
from dist_tl.models.generators.diffusion import DiffusionConfig
from dist_tl.models.networks import NetworkConfig
from dist_tl.storage.model_files import absolute_place


class SourceConfig(StrictModel):
    """A source classifier and a conditional generator to train, in place of downloaded ones."""

    data: DataConfig
    holdout_folds: int = Field(
        default=5, ge=2, description="Number of folds; one is held out to judge the generator."
    )
    classifier: NetworkConfig
    classifier_training: BudgetConfig
    generator: DiffusionConfig
    generator_training: BudgetConfig
    generator_ema_decay: float = Field(default=0.995, gt=0, lt=1)
    generator_views: ViewsConfig = Field(
        default_factory=lambda: ViewsConfig(kind="none"),
        description="Views of the generator's images; the classifier's are in `data.views`.",
    )


class SourceAssets(StrictModel):
    """A trained source classifier and a trained conditional generator."""

    classifier: ModelPlace = Field(
        description="Folder or URL with model.safetensors and config.json."
    )
    generator: GeneratorConfig

    @field_validator("generator")
    @classmethod
    def _not_a_key_of_the_run(cls, generator: GeneratorConfig) -> GeneratorConfig:
        if not isinstance(generator, StoredDiffusionConfig):  # its name may be one on a hub
            return generator
        return generator.model_copy(update={"path": absolute_place(generator.path)})


class SourceJob(TrainingJobConfig):
    """Trains a source classifier and a conditional generator, and judges the generator."""

    source: SourceConfig

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
        check_source_batches(self, self.source)
        return self


def check_source_batches(job: TrainingJobConfig, source: SourceConfig) -> None:
    """Checks that the lanes can share the batches of the source's trainings.

    Raises:
        ValueError: they cannot; names the field and the nearest sizes that work.
    """
    for name in ("classifier_training", "generator_training"):
        job.check_batch(f"source.{name}.batch_size", getattr(source, name).batch_size)
