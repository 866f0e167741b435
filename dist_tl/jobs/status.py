"""How far a run is, from its store alone: so it works from anywhere, whatever runs the job."""

import time
from typing import Any

from pydantic import Field

from dist_tl.cluster.scaling import Bounds, read_scale
from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError
from dist_tl.jobs.source.plan import PHASE
from dist_tl.shards.manifest import read_manifest
from dist_tl.storage import layout
from dist_tl.storage.attempts import latest_attempt
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.loop import read_rows


class StageStatus(StrictModel):
    """One stage that has begun."""

    stage: str
    state: str = Field(description='"done", "shards", "training" or "begun".')
    progress: str


class RunStatus(StrictModel):
    """A run as its store shows it."""

    run: str
    kind: str
    state: str = Field(description='"done" or "unfinished".')
    attempts: int
    last_started: float | None = Field(description="Unix time of the latest start.")
    last_host: str | None
    generators: Bounds | None = Field(description="Bounds set by `dist-tl scale`.")
    stages: tuple[StageStatus, ...]
    cluster: str | None = Field(
        default=None, description="What the cluster it was handed to says of it."
    )


def run_status(store: ObjectStore) -> RunStatus:
    """What is committed, and by whom.

    Raises:
        ConfigError: there is no run at this place.
    """
    job = _job_of(store)
    number = latest_attempt(store)
    start = store.read_json(layout.attempt_key(number)) if number else {}
    scale = read_scale(store)
    return RunStatus(
        run=store.url,
        kind=job["kind"],
        state="done" if _is_done(store, job["kind"]) else "unfinished",
        attempts=number,
        last_started=start.get("started"),
        last_host=start.get("host"),
        generators=scale.generators if scale else None,
        stages=tuple(_stages(store)),
    )


def check_has_generators(store: ObjectStore) -> None:
    """That there is a pool to scale.

    Raises:
        ConfigError: there is no run at this place, or it draws no pseudo-samples.
    """
    job = _job_of(store)
    if job.get("generators") is None:
        raise ConfigError(f"{store.url} is of kind {job['kind']} and has no generators to scale")


def _job_of(store: ObjectStore) -> dict[str, Any]:
    if not store.exists(layout.JOB):
        raise ConfigError(
            f"{store.url} holds no run (no {layout.JOB}); check the URL, and that the job has begun"
        )
    return dict(store.read_json(layout.JOB)["job"])


def _is_done(store: ObjectStore, kind: str) -> bool:
    if kind == "source":  # it makes models, no results
        return store.exists(layout.result_key(PHASE))
    return store.exists(layout.RESULTS)


def _stages(store: ObjectStore) -> list[StageStatus]:
    keys: dict[str, list[str]] = {}
    for key in store.list("stages"):
        _, stage, rest = key.split("/", 2)
        keys.setdefault(stage, []).append(rest)
    return [_stage(store, stage, names) for stage, names in sorted(keys.items())]


def _stage(store: ObjectStore, stage: str, names: list[str]) -> StageStatus:
    if "manifest.json" in names:
        manifest = read_manifest(store, stage)
        assert manifest is not None, "listed just now"
        done = sum(name.startswith("entries/") for name in names)
        state = "done" if done == manifest.plan.num_shards else "shards"
        return StageStatus(
            stage=stage, state=state, progress=f"{done} of {manifest.plan.num_shards} shards"
        )
    if "result.json" in names:
        return StageStatus(stage=stage, state="done", progress="")
    if "metrics.jsonl" in names:
        rows = read_rows(store.read_or_none(layout.metrics_key(stage)))
        at = f"step {rows[-1]['step']}, loss {rows[-1]['loss']:.3f}, " if rows else ""
        commits = [name.split("/")[1] for name in names if name.endswith("/COMMIT")]
        saved = max((layout.parse_checkpoint_step(name) or 0 for name in commits), default=0)
        progress = f"{at}checkpoint at step {saved}"
        return StageStatus(stage=stage, state="training", progress=progress)
    return StageStatus(stage=stage, state="begun", progress="")


def age(seconds_ago: float) -> str:
    """How long ago, as people say it."""
    past = max(0.0, time.time() - seconds_ago)
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if past >= 2 * size:
            return f"{past / size:.0f} {unit} ago"
    return f"{past:.0f} seconds ago"
