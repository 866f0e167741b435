"""The manifold job: sources, moments, cells and baselines as Ray tasks. Wiring only."""

from dataclasses import dataclass

from dist_tl.jobs.manifold.plan import ManifoldPlan
from dist_tl.jobs.manifold.sources import (
    SourceOutput,
    Stored,
    sum_moments,
    train_source,
)
from dist_tl.jobs.manifold.spec import ManifoldJob
from dist_tl.jobs.manifold.tasks import (
    PointsOutput,
    measure_baseline,
    measure_cell,
)
from dist_tl.jobs.phases import open_phases
from dist_tl.report.results import StageRecord
from dist_tl.storage.attempts import Attempt
from dist_tl.telemetry import Progress


@dataclass(frozen=True)
class ManifoldOutcome:
    """What all tasks found, by instance and cell."""

    job: ManifoldJob
    sources: dict[tuple[int, int], SourceOutput]  # by instance and source_latent
    cells: dict[tuple[int, str], PointsOutput]  # by instance and cell
    baselines: dict[tuple[int, int], PointsOutput]  # by instance and target_latent
    stages: tuple[StageRecord, ...]
    peak_memory_bytes: int


def run_manifold(job: ManifoldJob, attempt: Attempt, progress: Progress) -> ManifoldOutcome:
    """Run every task that is not done yet.

    Raises:
        DistTLError: the named error that a task met; what is done stays done.
    """
    plan = ManifoldPlan(job)
    with open_phases(job, job.trials, attempt, progress) as phases:
        sources = phases.run("sources", train_source, plan.sources(), SourceOutput)
        phases.run("moments", sum_moments, plan.moments(), Stored)
        baselines = phases.run("baselines", measure_baseline, plan.baselines(), PointsOutput)
        cells = phases.run("cells", measure_cell, plan.cells(), PointsOutput)
        stages, memory = tuple(phases.records), phases.peak_memory_bytes
    return ManifoldOutcome(
        job=job,
        sources=dict(zip(plan.source_keys(), sources, strict=True)),
        cells=dict(zip(plan.cell_keys(), cells, strict=True)),
        baselines=dict(zip(plan.baseline_keys(), baselines, strict=True)),
        stages=stages,
        peak_memory_bytes=memory,
    )
