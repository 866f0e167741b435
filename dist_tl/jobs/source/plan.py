"""Plans the stages that read source data, and describes the source after they have finished.

Only this module names source data. After the source phase a job holds two models and the moments
of their features; `forbid_source_data` rejects any later stage that would read source data.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from dist_tl.config import StrictModel, fingerprint
from dist_tl.datasets.spec import selected_rows
from dist_tl.errors import ConfigError
from dist_tl.jobs.plan import PlanTable, plan_table
from dist_tl.jobs.source.spec import SourceAssets, SourceConfig, SourceJob
from dist_tl.jobs.spec import JobConfig, TrainingJobConfig
from dist_tl.jobs.stages import training_stage
from dist_tl.models.generators.config import GeneratorConfig, StoredDiffusionConfig
from dist_tl.shards.drawing import generator_fingerprint, open_generator
from dist_tl.storage import layout
from dist_tl.storage.model_files import files_fingerprint, read_model_files
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import read_record
from dist_tl.train.models import NewGenerator, NewNetwork, load_classifier
from dist_tl.train.objectives import DiffusionSpec, SupervisedSpec
from dist_tl.train.rows import FoldSpec, RowsSpec, load_rows
from dist_tl.train.spec import StageSpec

CLASSIFIER = "source-classifier"
GENERATOR = "source-generator"
SOURCE_STAGES = (CLASSIFIER, GENERATOR)
PHASE = "source"
NOT_TRAINED = "not trained yet"


class SourceFacts(StrictModel):
    """What later stages know about the source; result.json of the source phase."""

    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    classifier: str = Field(description="Location of the classifier's files.")
    generator: GeneratorConfig
    classifier_fingerprint: str = NOT_TRAINED
    generator_fingerprint: str = NOT_TRAINED
    classifier_accuracy: float | None = Field(default=None, description="On held-out images.")
    frechet_real: float | None = Field(
        default=None,
        description="Frechet distance between held-out and training images: the floor.",
    )
    num_held_out: int = 0
    training_rows: RowsSpec | None = Field(
        default=None, description="Source data that reference arms may read in the source phase."
    )


@dataclass(frozen=True)
class SourcePlan:
    """The stages of one job."""

    job: SourceJob
    source: SourceFacts

    def table(self) -> PlanTable:
        """The trainings of classifier and generator."""
        return plan_table(self.job, train=source_stages(self.job, self.job.source, self.source))


def plan(job: SourceJob, store: ObjectStore) -> SourcePlan:
    """The stages of a job; see :func:`source_facts`."""
    return SourcePlan(job, source_facts(job, job.source, store))


def source_facts(
    job: JobConfig, source: SourceConfig | SourceAssets, store: ObjectStore
) -> SourceFacts:
    """The trained source, or what its data says before training; loads data only in that case.

    Raises:
        ConfigError: a model is missing, the two models do not fit, or there are too few images.
        DataError: the source data is damaged.
    """
    if isinstance(source, SourceAssets):
        return _open_assets(store, source)
    remedy = "start the same job again, which judges the source again"
    if stored := read_record(store, layout.result_key(PHASE), SourceFacts, remedy=remedy):
        return stored
    training = source_rows(job, source, held_out=False)
    rows = load_rows(training)
    return SourceFacts(
        image_shape=rows.image_shape,
        num_classes=rows.num_classes,
        class_names=rows.class_names,
        classifier=layout.stage_model_prefix(CLASSIFIER),
        generator=StoredDiffusionConfig(path=layout.stage_model_prefix(GENERATOR)),
        training_rows=training,
    )


def _open_assets(store: ObjectStore, assets: SourceAssets) -> SourceFacts:
    classifier = load_classifier(store, assets.classifier)
    generator = open_generator(store, assets.generator)
    for name, left, right in (
        ("source classes", classifier.num_classes, generator.num_classes),
        ("image shape", classifier.image_shape, tuple(generator.image_shape)),
    ):
        if left != right:
            raise ConfigError(f"source: {name}: the classifier has {left}, the generator {right}")
    return SourceFacts(
        image_shape=classifier.image_shape,
        num_classes=classifier.num_classes,
        class_names=tuple(str(index) for index in range(classifier.num_classes)),
        classifier=assets.classifier,
        classifier_fingerprint=files_fingerprint(read_model_files(store, assets.classifier)),
        generator=assets.generator,
        generator_fingerprint=generator_fingerprint(store, assets.generator),
    )


def source_rows(job: JobConfig, source: SourceConfig, *, held_out: bool) -> RowsSpec:
    """The held-out fold of the source images, or all others."""
    fold = FoldSpec(index=0, count=source.holdout_folds, seed=job.seed, held_out=held_out)
    return RowsSpec(data=source.data, fold=fold, together=job.duplicates == "together")


def source_stages(
    job: TrainingJobConfig, source: SourceConfig | SourceAssets, facts: SourceFacts
) -> list[StageSpec]:
    """The trainings of source classifier and generator; empty if the job names trained ones."""
    if isinstance(source, SourceAssets):
        return []
    shared: dict[str, Any] = {
        "seed": job.seed,
        "image_shape": facts.image_shape,
        "labelled": source_rows(job, source, held_out=False),
    }
    classifier = training_stage(
        job,
        source.classifier_training,
        name=CLASSIFIER,
        model=NewNetwork(network=source.classifier, num_classes=facts.num_classes),
        objective=SupervisedSpec(),
        views=source.data.views,
        evaluate=source_rows(job, source, held_out=True),
        **shared,
    )
    generator = training_stage(
        job,
        source.generator_training,
        name=GENERATOR,
        model=NewGenerator(generator=source.generator, num_classes=facts.num_classes),
        objective=DiffusionSpec(),
        views=source.generator_views,
        ema_decay=source.generator_ema_decay,
        **shared,
    )
    return [classifier, generator]


def forbid_source_data(stages: Iterable[StageSpec], source: SourceConfig | SourceAssets) -> None:
    """Rejects stages that would read an image of the source data after the source phase.

    Raises:
        ConfigError: naming the stage.
    """
    if isinstance(source, SourceAssets):
        return
    forbidden = selected_rows(source.data)
    shared: dict[str, bool] = {}
    for stage in stages:
        for rows in (stage.labelled, stage.unlabelled, stage.evaluate):
            if not isinstance(rows, RowsSpec):
                continue
            key = fingerprint(rows.data)
            if key not in shared:
                shared[key] = not forbidden.isdisjoint(selected_rows(rows.data))
            if shared[key]:
                raise ConfigError(
                    f"stage {stage.name} would read source data after the source phase; the "
                    "target's data must differ from the source's (another part, or other classes)"
                )
