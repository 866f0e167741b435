"""Runs a job of any kind in its store: claim the folder, plan, run, export, store the results."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dist_tl.cluster.session import set_variable
from dist_tl.errors import ConfigError, DamagedError, StorageError
from dist_tl.jobs.identity import check_same_job, claim, identity
from dist_tl.jobs.inputs import pin_inputs
from dist_tl.jobs.kinds import KINDS
from dist_tl.jobs.overview import overview_of
from dist_tl.jobs.spec import JobConfig
from dist_tl.jobs.versions import versions
from dist_tl.jobs.workers import open_workers
from dist_tl.report.collect import write_report
from dist_tl.report.results import (
    AnyResults,
    RunRecord,
    results_of,
    stored_results,
    write_results,
)
from dist_tl.storage import layout
from dist_tl.storage.attempts import begin_attempt
from dist_tl.storage.embedded import EmbeddedS3
from dist_tl.storage.objects import ObjectStore
from dist_tl.telemetry import Progress


def run_job(job: JobConfig, progress: Progress) -> AnyResults:
    """Runs `job`, or resumes it; finished stages and tasks are not repeated.

    Writes the report too. What is found damaged is made again, each object once.

    Raises:
        ConfigError: the job cannot work, or the run folder holds another job.
        DataError: an input is damaged, or is not the one that the run began with.
        DamagedError: what was made again is damaged again.
        DistTLError: the job failed; committed work is kept, and the same call resumes.
    """
    healed: set[str] = set()
    with open_store(job) as store:
        while True:
            try:
                results = _run(job, store, progress)
                write_report(store)
                return results
            except DamagedError as damage:
                if not damage.marker or damage.marker in healed:
                    raise
                healed.add(damage.marker)
                progress.say(f"{damage.args[0].partition(';')[0]}; it is made again")
                # The marker first: what has no marker does not exist.
                store.delete(damage.marker)
                store.delete(layout.RESULTS)


def _run(job: JobConfig, store: ObjectStore, progress: Progress) -> AnyResults:
    began, kind = time.monotonic(), KINDS[job.kind]
    job, manifests = pin_inputs(job, store)
    check_same_job(job, manifests, store)
    if (stored := stored_results(store)) is not None:
        claim(job, manifests, store)
        progress.say("this run has finished; its results are shown again")
        return stored
    plan = kind.plan(job, store)
    if not store.exists(layout.JOB):
        for line in overview_of(job).lines():
            progress.say(line)
    claim(job, manifests, store)
    attempt = begin_attempt(store, identity(job))
    with open_workers(job, attempt, progress) as workers:
        outcome = kind.run(plan, workers)
        stages, memory = workers.records(), workers.session.peak_memory_bytes
    attempt.check()
    findings = kind.results(outcome)
    kind.export(outcome, store)
    record = RunRecord(
        run=job.run,
        kind=job.kind,
        fingerprint=identity(job),
        stages=stages,
        versions=versions(),
        wall_seconds=time.monotonic() - began,
        peak_memory_bytes=memory,
        gallery=store.exists(layout.GALLERY),
    )
    results = results_of(record, findings)
    attempt.check()
    write_results(store, results)
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
