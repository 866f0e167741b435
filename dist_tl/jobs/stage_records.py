"""Stages of a run as records of its timeline."""

from dist_tl.cluster.generators import StageProgress
from dist_tl.report.results import StageRecord
from dist_tl.train.spec import StageResult


def training_record(result: StageResult, kind: str) -> StageRecord:
    """The record of a training stage.

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


def generation_record(stage: StageProgress) -> StageRecord:
    """The record of a stage of pseudo samples."""
    last = stage.last_commit_at or stage.started
    return StageRecord(
        name=stage.spec.name,
        kind="generate",
        started=min(at for at in (stage.first_order_at, stage.first_commit_at, last) if at),
        ended=last,
        figures={
            "shards": float(stage.committed),
            "bytes": float(stage.bytes),
            "samples": float(stage.spec.num_samples),
            "worker_s": stage.worker_seconds,
            "last_commit_at": last,
        },
    )
