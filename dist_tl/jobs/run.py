"""Runs a job of any kind in its store: claim the folder, plan, run, export, store the results."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dist_tl.cluster.session import set_variable
from dist_tl.config import differing_fields, fingerprint
from dist_tl.errors import ConfigError, StorageError
from dist_tl.jobs.kinds import KINDS
from dist_tl.jobs.overview import overview_of
from dist_tl.jobs.spec import MAY_CHANGE, JobConfig
from dist_tl.jobs.versions import versions
from dist_tl.jobs.workers import open_workers
from dist_tl.report.results import AnyResults, RunRecord, read_results, results_of
from dist_tl.storage import layout
from dist_tl.storage.attempts import begin_attempt
from dist_tl.storage.embedded import EmbeddedS3
from dist_tl.storage.objects import ObjectStore
from dist_tl.telemetry import Progress


def run_job(job: JobConfig, progress: Progress) -> AnyResults:
    """Runs `job`, or resumes it; finished stages and tasks are not repeated.

    Raises:
        ConfigError: the job cannot work, or the run folder holds another job.
        DistTLError: the job failed; committed work is kept, and the same call resumes.
    """
    began, kind = time.monotonic(), KINDS[job.kind]
    with open_store(job) as store:
        check_same_job(job, store)
        if (stored := store.read_or_none(layout.RESULTS)) is not None:
            progress.say("this run has finished; its results are shown again")
            return read_results(stored)
        plan = kind.plan(job, store)
        if not store.exists(layout.JOB):
            for line in overview_of(job).lines():
                progress.say(line)
        _claim(job, store)
        attempt = begin_attempt(store)
        with open_workers(job, attempt, progress) as workers:
            outcome = kind.run(plan, workers)
            stages, memory = workers.records(), workers.session.peak_memory_bytes
        attempt.check()
        findings = kind.results(outcome)
        kind.export(outcome, store)
        record = RunRecord(
            run=job.run,
            kind=job.kind,
            fingerprint=fingerprint(_identity(job.model_dump(mode="json"))),
            stages=stages,
            versions=versions(),
            wall_seconds=time.monotonic() - began,
            peak_memory_bytes=memory,
        )
        results = results_of(record, findings)
        attempt.check()
        store.write(layout.RESULTS, results.model_dump_json(indent=1).encode())
        return results


@contextmanager
def open_store(job: JobConfig) -> Iterator[ObjectStore]:
    """The store of the run, checked to be writable; `store: embedded` is served on loopback.

    Raises:
        ConfigError: the store refuses; the message says what to check.
    """
    if job.store == "direct":
        yield _writable(ObjectStore(job.run))
        return
    with EmbeddedS3(job.run) as server:
        before = {key: os.environ.get(key) for key in server.environment()}
        # Ray's processes are our children and inherit this; no file or log ever holds it.
        os.environ.update(server.environment())
        try:
            yield _writable(ObjectStore(server.url))
        finally:
            for key, value in before.items():
                set_variable(key, value)


def _writable(store: ObjectStore) -> ObjectStore:
    try:
        store.probe()
    except StorageError as error:  # nothing has started: this is the job's fault, not the run's
        raise ConfigError(f"run: {error}") from None
    return store


def _identity(job: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that change a job's results."""
    return {key: value for key, value in job.items() if key not in (*MAY_CHANGE, "run")}


def check_same_job(job: JobConfig, store: ObjectStore) -> None:
    """Checks that the run folder holds no other job.

    Raises:
        ConfigError: it does; the message names the fields that differ.
    """
    stored = store.read_or_none(layout.JOB)
    if stored is None:
        return
    before, now = json.loads(stored)["job"], job.model_dump(mode="json")
    if differing := differing_fields(_identity(before), _identity(now)):
        raise ConfigError(
            f"{job.run} holds another job: {', '.join(differing)} differ; choose another "
            f"run folder (run=...), or delete that one. May change between attempts: "
            f"{', '.join(MAY_CHANGE)}"
        )


def _claim(job: JobConfig, store: ObjectStore) -> None:
    if store.exists(layout.JOB):
        return
    plain = job.model_dump(mode="json")
    store.write_json(
        layout.JOB,
        {"job": plain, "fingerprint": fingerprint(_identity(plain)), "versions": versions()},
    )
