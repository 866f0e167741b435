"""Runs a manifold job: sources, moments, baselines and cells as Ray tasks."""

from dataclasses import dataclass

from dist_tl.jobs.manifold.plan import ManifoldPlan
from dist_tl.jobs.manifold.sources import MomentsOutput, SourceOutput, sum_moments, train_source
from dist_tl.jobs.manifold.tasks import ErrorsOutput, measure_baseline, measure_cell
from dist_tl.jobs.workers import Workers


@dataclass(frozen=True)
class ManifoldOutcome:
    """Outputs of all tasks, by instance and cell.

    Attributes:
        sources: by instance and source_latent.
        cells: by instance and cell name.
        baselines: by instance and target_latent.
    """

    plan: ManifoldPlan
    sources: dict[tuple[int, int], SourceOutput]
    cells: dict[tuple[int, str], ErrorsOutput]
    baselines: dict[tuple[int, int], ErrorsOutput]


def run(plan: ManifoldPlan, workers: Workers) -> ManifoldOutcome:
    """Runs every task that has no output yet.

    Raises:
        DistTLError: the named error of a task; finished tasks are kept.
    """
    sources = workers.run_tasks("sources", train_source, plan.sources(), SourceOutput)
    workers.run_tasks("moments", sum_moments, plan.moments(), MomentsOutput)
    baselines = workers.run_tasks("baselines", measure_baseline, plan.baselines(), ErrorsOutput)
    cells = workers.run_tasks("cells", measure_cell, plan.cells(), ErrorsOutput)
    return ManifoldOutcome(
        plan=plan,
        sources=dict(zip(plan.source_keys(), sources, strict=True)),
        cells=dict(zip(plan.cell_keys(), cells, strict=True)),
        baselines=dict(zip(plan.baseline_keys(), baselines, strict=True)),
    )
