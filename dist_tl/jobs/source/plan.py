"""The stages that read source data, and what remains of the source once they are done.

This is the only place that names source data. Afterwards a job holds two models and a few
moments of features; `forbid_source_data` refuses any later stage that would look again.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import Field

from dist_tl.config import StrictModel, fingerprint
from dist_tl.datasets.views import ViewsConfig
from dist_tl.errors import ConfigError
from dist_tl.jobs.plan import PlanTable, plan_table
from dist_tl.jobs.source.spec import SourceAssets, SourceConfig, SourceJob
from dist_tl.jobs.spec import BudgetConfig, TrainingJobConfig
from dist_tl.jobs.stages import training_stage
from dist_tl.models.generators.config import GeneratorConfig, StoredDiffusionConfig
from dist_tl.shards.drawing import generator_fingerprint, open_generator
from dist_tl.storage import layout
from dist_tl.storage.model_files import files_fingerprint, read_model_files
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.models import (
    ModelSpec,
    NewGenerator,
    NewNetwork,
    load_classifier,
)
from dist_tl.train.objectives import DiffusionSpec, ObjectiveSpec, SupervisedSpec
from dist_tl.train.rows import FoldSpec, RowsSpec, load_rows
from dist_tl.train.spec import StageSpec

CLASSIFIER = "source-classifier"
GENERATOR = "source-generator"
SOURCE_STAGES = (CLASSIFIER, GENERATOR)
PHASE = "source"
TO_COME = "not trained yet"


class SourceFacts(StrictModel):
    """What a transfer job knows of its source."""

    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    classifier: str = Field(description="Where the classifier's files are.")
    generator: GeneratorConfig
    classifier_fingerprint: str = Field(default=TO_COME, description="Of the classifier's files.")
    generator_fingerprint: str = Field(default=TO_COME, description="Of the generator's files.")
    classifier_accuracy: float | None = Field(
        default=None, description="On held-out source images."
    )
    frechet_real: float | None = Field(
        default=None,
        description="Frechet distance of held-out real images to the others: the floor.",
    )
    num_held_out: int = 0
    training_rows: RowsSpec | None = Field(
        default=None,
        description="The source data, for the one reference that may read it in this phase.",
    )


def plan(job: SourceJob, store: ObjectStore) -> "SourcePlan":
    """The stages of a job that trains a source; its data is opened only if it is still needed.

    Raises:
        ConfigError: the job asks for more than the source data has.
        DataError: the source data is damaged.
    """
    return SourcePlan(job, find_source(store) or planned_facts(job.source, job.seed))


@dataclass(frozen=True)
class SourcePlan:
    """The stages of one job."""

    job: SourceJob
    source: SourceFacts

    def table(self) -> PlanTable:
        """The trainings of classifier and generator."""
        return plan_table(self.job, train=source_stages(self.job, self.job.source, self.source))


def find_source(store: ObjectStore) -> SourceFacts | None:
    """The facts about the source of this run; None if the source phase has not finished."""
    data = store.read_or_none(layout.result_key(PHASE))
    return None if data is None else SourceFacts.model_validate_json(data)


def source_rows(source: SourceConfig, seed: int, *, held_out: bool) -> RowsSpec:
    """The source images that are learnt from, or the fold that is not."""
    fold = FoldSpec(index=0, count=source.holdout_folds, seed=seed, held_out=held_out)
    return RowsSpec(data=source.data, fold=fold)


def source_stages(
    job: TrainingJobConfig, source: SourceConfig, facts: SourceFacts
) -> list[StageSpec]:
    """The training of the source classifier and of the generator."""
    classifier = _stage(
        job,
        source,
        CLASSIFIER,
        NewNetwork(network=source.classifier, num_classes=facts.num_classes),
        SupervisedSpec(),
        source.classifier_training,
        source.data.views,
        facts.image_shape,
    )
    generator = _stage(
        job,
        source,
        GENERATOR,
        NewGenerator(generator=source.generator, num_classes=facts.num_classes),
        DiffusionSpec(),
        source.generator_training,
        source.generator_views,
        facts.image_shape,
    )
    held_out = source_rows(source, job.seed, held_out=True)
    return [
        classifier.model_copy(update={"evaluate": held_out}),
        generator.model_copy(update={"ema_decay": source.generator_ema_decay}),
    ]


def _stage(
    job: TrainingJobConfig,
    source: SourceConfig,
    name: str,
    model: ModelSpec,
    objective: ObjectiveSpec,
    budget: BudgetConfig,
    views: ViewsConfig,
    image_shape: tuple[int, int, int],
) -> StageSpec:
    return training_stage(
        job,
        budget,
        name=name,
        seed=job.seed,
        model=model,
        objective=objective,
        image_shape=image_shape,
        labelled=source_rows(source, job.seed, held_out=False),
        views=views,
    )


def planned_facts(source: SourceConfig, seed: int) -> SourceFacts:
    """What is known, from its data alone, of a source that is still to be trained.

    Raises:
        ConfigError: the job asks for what the source data cannot give.
        DataError: the source data is damaged.
    """
    rows = load_rows(source_rows(source, seed, held_out=False))
    return SourceFacts(
        image_shape=rows.image_shape,
        num_classes=rows.num_classes,
        class_names=rows.class_names,
        classifier=layout.stage_model_prefix(CLASSIFIER),
        generator=StoredDiffusionConfig(path=layout.stage_model_prefix(GENERATOR)),
        training_rows=source_rows(source, seed, held_out=False),
    )


def open_assets(store: ObjectStore, assets: SourceAssets) -> SourceFacts:
    """What a classifier and a generator that exist already say of themselves.

    Raises:
        ConfigError: one is missing, or the two do not fit each other.
    """
    classifier = load_classifier(store, assets.classifier)
    generator = open_generator(store, assets.generator)
    for what, own, other in (
        ("source classes", classifier.num_classes, generator.num_classes),
        ("image shape", classifier.image_shape, tuple(generator.image_shape)),
    ):
        if own != other:
            raise ConfigError(f"source: {what}: the classifier has {own}, the generator {other}")
    return SourceFacts(
        image_shape=classifier.image_shape,
        num_classes=classifier.num_classes,
        class_names=tuple(str(index) for index in range(classifier.num_classes)),
        classifier=assets.classifier,
        classifier_fingerprint=files_fingerprint(read_model_files(store, assets.classifier)),
        generator=assets.generator,
        generator_fingerprint=generator_fingerprint(store, assets.generator),
    )


def forbid_source_data(stages: Iterable[StageSpec], source: SourceConfig | SourceAssets) -> None:
    """Refuse stages that would open source data after the source phase.

    Raises:
        ConfigError: naming the stage.
    """
    if isinstance(source, SourceAssets):
        return
    forbidden = fingerprint(source.data)
    for stage in stages:
        for rows in (stage.labelled, stage.unlabelled, stage.evaluate):
            if isinstance(rows, RowsSpec) and fingerprint(rows.data) == forbidden:
                raise ConfigError(
                    f"stage {stage.name} would read source data after the source phase; the "
                    "target's data must differ from the source's (another part, or other classes)"
                )
