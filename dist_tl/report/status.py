"""Progress of a run, read from its store only: independent of the system that runs the job."""

import time
from typing import Any

from pydantic import Field

from dist_tl.cluster.scaling import Bounds, read_scale
from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError
from dist_tl.report.results import JobRecord, stored_results
from dist_tl.shards.manifest import read_manifest
from dist_tl.storage import layout
from dist_tl.storage.attempts import latest_attempt, latest_record
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import damaged, read_record
from dist_tl.train.loop import read_rows


class StageStatus(StrictModel):
    """Progress of one stage that has started."""

    stage: str = Field(description="Name of the stage.")
    state: str = Field(description='"done", "shards", "training" or "begun".')
    progress: str = Field(description="Shards, or step, loss and checkpoint; may be empty.")


class RunStatus(StrictModel):
    """Status of a run."""

    run: str = Field(description="Folder or URL of the run.")
    kind: str = Field(description="Kind of the job.")
    state: str = Field(description='"done" or "unfinished".')
    attempts: int = Field(description="Number of attempts.")
    last_started: float | None = Field(description="Unix time at which the last attempt started.")
    last_host: str | None = Field(description="Host of the last attempt.")
    generators: Bounds | None = Field(description="Bounds set by `dist-tl scale`.")
    stages: tuple[StageStatus, ...] = Field(description="Stages that have started.")
    cluster: str | None = Field(
        default=None, description="State of the job as reported by its cluster."
    )


def run_status(store: ObjectStore) -> RunStatus:
    """Returns the attempts of a run and the committed progress of its stages.

    Raises:
        ConfigError: the store contains no run.
        DamagedError: a record of the run is not the one that was written.
    """
    job = _read_job(store)
    attempt = latest_record(store)
    scale = read_scale(store)
    return RunStatus(
        run=store.url,
        kind=job["kind"],
        state="done" if stored_results(store) else "unfinished",
        attempts=latest_attempt(store),
        last_started=attempt.started,
        last_host=attempt.host if attempt.started else None,
        generators=scale.generators if scale else None,
        stages=tuple(_stages(store)),
    )


def check_has_generators(store: ObjectStore) -> None:
    """Checks that a run has generators to scale.

    Raises:
        ConfigError: the store contains no run, or the run has no generators.
    """
    job = _read_job(store)
    if job.get("generators") is None:
        raise ConfigError(f"{store.url} is of kind {job['kind']} and has no generators to scale")


def _read_job(store: ObjectStore) -> dict[str, Any]:
    remedy = "`dist-tl run` with the same job writes it again"
    record = read_record(store, layout.JOB, JobRecord, remedy=remedy)
    if record is None:
        raise ConfigError(
            f"{store.url} contains no run (no {layout.JOB}); check the URL, and that the job has "
            "started"
        )
    return record.job


def _stages(store: ObjectStore) -> list[StageStatus]:
    keys: dict[str, list[str]] = {}
    for key in store.list("stages"):
        _, stage, rest = key.split("/", 2)
        keys.setdefault(stage, []).append(rest)
    return [_stage(store, stage, names) for stage, names in sorted(keys.items())]


def _stage(store: ObjectStore, stage: str, names: list[str]) -> StageStatus:
    if "manifest.json" in names:
        manifest = read_manifest(store, stage)
        assert manifest is not None, "it was just listed"
        done = sum(name.startswith("entries/") for name in names)
        state = "done" if done == manifest.plan.num_shards else "shards"
        return StageStatus(
            stage=stage, state=state, progress=f"{done} of {manifest.plan.num_shards} shards"
        )
    if "result.json" in names:
        return StageStatus(stage=stage, state="done", progress="")
    if "metrics.jsonl" in names:
        latest = _latest_step(store, stage)
        commits = [name.split("/")[1] for name in names if name.endswith("/COMMIT")]
        saved = max((layout.parse_checkpoint_step(name) or 0 for name in commits), default=0)
        progress = f"{latest}checkpoint at step {saved}"
        return StageStatus(stage=stage, state="training", progress=progress)
    return StageStatus(stage=stage, state="begun", progress="")


def _latest_step(store: ObjectStore, stage: str) -> str:
    key = layout.metrics_key(stage)
    try:
        rows = read_rows(store.read_or_none(key))
        return f"step {rows[-1]['step']}, loss {rows[-1]['loss']:.3f}, " if rows else ""
    except (ValueError, LookupError, TypeError) as error:
        remedy = "a running stage replaces it within seconds, a resumed one restores it"
        raise damaged(key, repr(error), remedy=f"look again: {remedy}") from None


def age(unix_time: float) -> str:
    """Returns the time since `unix_time` as text, e.g. "3 minutes ago"."""
    seconds = max(0.0, time.time() - unix_time)
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"
