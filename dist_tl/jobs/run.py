"""Run a job of any kind in its store, or go on with it: claim the folder, run, keep the results."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dist_tl.config import differing_fields, fingerprint
from dist_tl.errors import ConfigError, StorageError
from dist_tl.jobs.forecast.results import forecast_results
from dist_tl.jobs.forecast.run import run_forecast
from dist_tl.jobs.forecast.spec import ForecastJob
from dist_tl.jobs.geometric_labels.results import geometry_results
from dist_tl.jobs.geometric_labels.run import run_geometric_labels
from dist_tl.jobs.geometric_labels.spec import GeometricLabelsJob
from dist_tl.jobs.hub.exports import export_hub, write_routes_gallery
from dist_tl.jobs.hub.results import hub_results
from dist_tl.jobs.hub.run import HubOutcome, run_hub
from dist_tl.jobs.hub.spec import HubJob
from dist_tl.jobs.job_file import MAY_CHANGE, Job
from dist_tl.jobs.layer_search.results import layer_search_results
from dist_tl.jobs.layer_search.run import run_layer_search
from dist_tl.jobs.layer_search.spec import LayerSearchJob
from dist_tl.jobs.manifold.results import manifold_results
from dist_tl.jobs.manifold.run import run_manifold
from dist_tl.jobs.manifold.spec import ManifoldJob
from dist_tl.jobs.predict.results import predict_results
from dist_tl.jobs.predict.run import run_predict
from dist_tl.jobs.predict.spec import PredictJob
from dist_tl.jobs.source.run import find_source, train_source
from dist_tl.jobs.spec import JobConfig
from dist_tl.jobs.transfer.exports import export_models, write_gallery
from dist_tl.jobs.transfer.results import transfer_results
from dist_tl.jobs.transfer.run import TransferOutcome, run_transfer
from dist_tl.jobs.transfer.spec import SourceJob, TransferJob
from dist_tl.jobs.versions import versions
from dist_tl.jobs.workers import open_workers
from dist_tl.report.results import AnyResults, read_any_results
from dist_tl.storage import layout
from dist_tl.storage.attempts import Attempt, begin_attempt
from dist_tl.storage.embedded import EmbeddedS3
from dist_tl.storage.objects import ObjectStore
from dist_tl.telemetry import Progress


def run_job(job: Job, progress: Progress) -> AnyResults | None:
    """Run `job`, or go on where an earlier start of the same job stopped.

    Returns:
        What was found; None for kinds that find nothing but make models.

    Raises:
        ConfigError: the job cannot work, or the run's folder holds another job.
        DistTLError: it failed; what is committed stays, and the same call goes on from there.
    """
    began = time.monotonic()
    with open_store(job) as store:
        claim(job, store)
        done = store.read_or_none(layout.RESULTS)
        if done is not None:
            progress.say("this run is done; its results are shown again")
            return read_any_results(done)
        attempt = begin_attempt(store)
        if isinstance(job, SourceJob):
            _run_source(job, attempt, progress)
            return None
        results = _found(job, attempt, progress, began)
        attempt.check()
        store.write(layout.RESULTS, results.model_dump_json(indent=1).encode())
        return results


def _found(job: Job, attempt: Attempt, progress: Progress, began: float) -> AnyResults:
    run, results = _KINDS[type(job)]
    store = attempt.store
    outcome = run(job, attempt, progress)
    attempt.check()
    found = results(
        outcome, run=job.run, fingerprint=identity(job), wall_seconds=time.monotonic() - began
    )
    if isinstance(outcome, TransferOutcome):
        export_models(outcome, store)
        write_gallery(outcome, store)
    if isinstance(outcome, HubOutcome):
        export_hub(outcome, store)
        write_routes_gallery(outcome, store)
    return found


_KINDS: dict[type[Job], tuple[Callable[..., Any], Callable[..., AnyResults]]] = {
    TransferJob: (run_transfer, transfer_results),
    HubJob: (run_hub, hub_results),
    PredictJob: (run_predict, predict_results),
    ManifoldJob: (run_manifold, manifold_results),
    ForecastJob: (run_forecast, forecast_results),
    LayerSearchJob: (run_layer_search, layer_search_results),
    GeometricLabelsJob: (run_geometric_labels, geometry_results),
}


def _run_source(job: SourceJob, attempt: Attempt, progress: Progress) -> None:
    store = attempt.store
    facts = find_source(store)
    if facts is None:
        with open_workers(job, attempt, progress) as workers:
            facts = train_source(job, job.source, workers)
    progress.say(
        f"below {store.url}: source classifier in {facts.classifier} "
        f"({facts.classifier_accuracy:.1%} on held-out images), generator in {facts.generator.path}"
    )


@contextmanager
def open_store(job: JobConfig) -> Iterator[ObjectStore]:
    """The run's store, checked to be writable; served on loopback for `store: embedded`.

    Raises:
        ConfigError: the store refuses; the message says what to check.
    """
    if job.store == "direct":
        yield _tried(ObjectStore(job.run))
        return
    with EmbeddedS3(job.run) as server:
        before = {key: os.environ.get(key) for key in server.environment()}
        # Ray's processes are our children and inherit this; no file or log ever holds it.
        os.environ.update(server.environment())
        try:
            yield _tried(ObjectStore(server.url))
        finally:
            for key, value in before.items():
                _restore(key, value)


def _tried(store: ObjectStore) -> ObjectStore:
    try:
        store.probe()
    except StorageError as error:  # nothing has started: this is the job's fault, not the run's
        raise ConfigError(f"run: {error}") from None
    return store


def _restore(key: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(key, None)
    else:
        os.environ[key] = value


def identity(job: Job) -> str:
    """Fingerprint of everything in the job that changes its results."""
    return fingerprint(_identifying(job))


def _identifying(job: Job) -> dict[str, Any]:
    return job.model_dump(mode="json", exclude={*MAY_CHANGE, "run"})


def claim(job: Job, store: ObjectStore) -> None:
    """Write job.json, or check that the folder holds this very job.

    Raises:
        ConfigError: it holds another; the message names the fields that differ.
    """
    found = store.read_or_none(layout.JOB)
    if found is not None:
        theirs, ours = json.loads(found)["job"], job.model_dump(mode="json")
        for key in (*MAY_CHANGE, "run"):
            theirs.pop(key, None)
            ours.pop(key, None)
        if differing := differing_fields(theirs, ours):
            raise ConfigError(
                f"{job.run} holds another job: {', '.join(differing)} differ; choose another "
                f"run folder (run=...), or delete that one. May change between starts: "
                f"{', '.join(MAY_CHANGE)}"
            )
        return
    store.write_json(
        layout.JOB,
        {
            "job": job.model_dump(mode="json"),
            "fingerprint": identity(job),
            "versions": versions(),
        },
    )
