"""Trainings as records of the timeline."""

from dist_tl.report.results import StageRecord
from dist_tl.train.spec import StageResult


def training_record(result: StageResult, kind: str) -> StageRecord:
    """When a stage trained, and its figures.

    Args:
        kind: "train" or "trial".
    """
    figures = {
        "steps": float(result.steps),
        "samples": float(result.samples),
        "starved_s": result.seconds_starved,
        "saving_s": result.seconds_saving,
    }
    if result.first_step_at is not None:
        figures["first_step_at"] = result.first_step_at
    return StageRecord(
        name=result.name, kind=kind, started=result.started, ended=result.ended, figures=figures
    )
