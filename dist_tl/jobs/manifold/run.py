"""Runs a manifold job: sources, moments, baselines and cells as Ray tasks."""

from dataclasses import dataclass

from dist_tl.jobs.manifold.plan import ManifoldPlan
from dist_tl.jobs.manifold.tasks import (
    ErrorsOutput,
    MomentsOutput,
    SourceOutput,
    measure_baseline,
    measure_cell,
    sum_moments,
    train_source,
)
from dist_tl.jobs.workers import Workers
from dist_tl.methods.hidden_manifold.measurements import Measurement


@dataclass(frozen=True)
class ManifoldOutcome:
    """Outputs of all tasks, by task name.

    Attributes:
        sources: test error of every source network on its own task.
        measurements: of every cell, then of every baseline.
    """

    plan: ManifoldPlan
    sources: dict[str, float]
    measurements: dict[str, tuple[Measurement, ...]]


def run(plan: ManifoldPlan, workers: Workers) -> ManifoldOutcome:
    """Runs every task that has no stored output.

    Raises:
        DistTLError: the named error of a task; finished tasks are kept.
    """
    sources = workers.run_tasks("sources", train_source, plan.sources(), SourceOutput)
    workers.run_tasks("moments", sum_moments, plan.moments(), MomentsOutput)
    baselines = workers.run_tasks("baselines", measure_baseline, plan.baselines(), ErrorsOutput)
    cells = workers.run_tasks("cells", measure_cell, plan.cells(), ErrorsOutput)
    measured = zip((*plan.cells(), *plan.baselines()), (*cells, *baselines), strict=True)
    return ManifoldOutcome(
        plan=plan,
        sources={t.name: o.error for t, o in zip(plan.sources(), sources, strict=True)},
        measurements={task.name: output.measurements for task, output in measured},
    )
