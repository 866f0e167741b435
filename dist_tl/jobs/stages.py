"""Training stages and rows of the target data, built alike for every kind of job."""

from typing import Any, Literal

import numpy as np

from dist_tl.datasets.images import LabelledImages
from dist_tl.datasets.spec import DataConfig
from dist_tl.datasets.splits import Indices
from dist_tl.jobs.spec import BudgetConfig, JobConfig, TargetDataConfig, TrainingJobConfig
from dist_tl.seeds import derive_seed
from dist_tl.train.rows import FoldSpec, RowsSpec, SplitSpec
from dist_tl.train.spec import StageSpec

Part = Literal["train", "pool", "test"]


def repeat_seed(job: JobConfig, repeat: int) -> int:
    """The seed of everything that differs between repeats: labels, weights and order."""
    return derive_seed(job.seed, "repeat", repeat)


def drawn_items(job: JobConfig, rows: LabelledImages) -> Indices:
    """Positions that draws from whole data sets use: each picture once if kept together."""
    return rows.distinct if job.duplicates == "together" else np.arange(len(rows))


def target_rows(
    job: JobConfig,
    target: TargetDataConfig,
    repeat: int,
    part: Part,
    *,
    data: DataConfig | None = None,
    fold: FoldSpec | None = None,
) -> RowsSpec:
    """A part of the target data in one repeat.

    Args:
        data: a part of the target data; absent: all of it.
        fold: one side of a fold of the training part.
    """
    split = SplitSpec(
        labels_per_class=target.labels_per_class,
        test_fraction=target.test_fraction,
        data_seed=job.seed,
        draw_seed=repeat_seed(job, repeat),
        part=part,
    )
    together = job.duplicates == "together"
    return RowsSpec(data=data or target.data, split=split, fold=fold, together=together)


def training_stage(job: TrainingJobConfig, budget: BudgetConfig, **fields: Any) -> StageSpec:
    """A stage on the job's trainers.

    Args:
        fields: further fields of the stage: name, seed, model, objective, rows, ...
    """
    return StageSpec(
        steps=budget.steps,
        batch_size=budget.batch_size,
        optimizer=budget.optimizer,
        lanes=job.lanes,
        engine=job.engine,
        checkpoints=job.checkpoints,
        **fields,
    )
