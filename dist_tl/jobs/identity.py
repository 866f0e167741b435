"""What a run is: its job and the contents of its inputs. Kept in job.json, compared at each start.

Where inputs and the run lie, and what only decides how fast results come, is not part of it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dist_tl.config import differing_fields, fingerprint
from dist_tl.contents import Manifest, differing_files, digest_of, split_pin, without_places
from dist_tl.errors import ConfigError, DamagedError, DataError
from dist_tl.jobs.spec import MAY_CHANGE, JobConfig
from dist_tl.jobs.versions import versions
from dist_tl.report.results import JobRecord, stored_results
from dist_tl.storage import layout
from dist_tl.storage.attempts import latest_record
from dist_tl.storage.model_files import read_manifest, write_manifest
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import read_record, write_record


def identity(job: JobConfig) -> str:
    """Returns the fingerprint of a job whose inputs are pinned."""
    return fingerprint(_identifying(job.model_dump(mode="json")))


def check_same_job(job: JobConfig, manifests: Sequence[Manifest], store: ObjectStore) -> None:
    """Checks that the run folder holds no other job, and no other contents of its inputs.

    Args:
        job: with its inputs pinned.
        manifests: of its inputs.

    Raises:
        ConfigError: it holds another job; the message names the fields that differ.
        DataError: the job is the same, but not its inputs; the message names the files.
    """
    stored = stored_job(store)
    if stored is None:
        _check_same_fingerprint(job, store)
        return
    before, now = stored.job, job.model_dump(mode="json")
    differing = differing_fields(_identifying(before), _identifying(now))
    if not differing:
        return
    new = {digest_of(manifest): manifest for manifest in manifests}
    changed = {
        path: _changed_files(store, new, _at(before, path), _at(now, path)) for path in differing
    }
    if all(changed.values()):
        files = "; ".join(f"{path}: {names}" for path, names in changed.items())
        raise DataError(
            f"{job.run} began with other inputs: {files}. Restore them and start the same job "
            "again, or choose another run folder (run=...)"
        )
    raise ConfigError(
        f"{job.run} holds another job: {', '.join(differing)} differ; choose another run folder "
        f"(run=...), or delete that one. May change between attempts: {', '.join(MAY_CHANGE)}"
    )


def claim(job: JobConfig, manifests: Sequence[Manifest], store: ObjectStore) -> None:
    """Writes the manifests of the inputs and job.json, unless they are there."""
    for manifest in manifests:
        write_manifest(store, manifest)
    if stored_job(store) is None:
        plain = job.model_dump(mode="json")
        record = JobRecord(job=plain, fingerprint=identity(job), versions=versions())
        write_record(store, layout.JOB, record)


def _identifying(job: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that change a job's results; of its inputs, their contents."""
    fields = {key: value for key, value in job.items() if key not in (*MAY_CHANGE, "run")}
    return json.loads(without_places(json.dumps(fields)))


def stored_job(store: ObjectStore) -> JobRecord | None:
    """Returns job.json, or None if it is missing or damaged: the attempts name the job too."""
    try:
        return read_record(store, layout.JOB, JobRecord, remedy="")
    except DamagedError:
        return None


def _check_same_fingerprint(job: JobConfig, store: ObjectStore) -> None:
    """Compares a job with what else names the job of a run without job.json."""
    known = latest_record(store).job
    if not known and (results := stored_results(store)):
        known = results.fingerprint
    if known != identity(job) and (known or store.list("stages")):
        raise ConfigError(
            f"{job.run} holds {'another job' if known else 'stages of an unknown job'}, and its "
            f"{layout.JOB} is missing or damaged; choose another run folder (run=...), or delete "
            "that one"
        )


def _at(fields: Any, path: str) -> Any:
    for key in path.split("."):
        if isinstance(fields, list):
            fields = fields[int(key)]
        else:
            fields = fields.get(key) if isinstance(fields, dict) else None
    return fields


def _changed_files(
    store: ObjectStore, manifests: Mapping[str, Manifest], before: Any, now: Any
) -> str:
    """Returns the files that differ between two contents of a place; "" for other values."""
    old, new = (split_pin(str(value))[1] for value in (before, now))
    if not old or new not in manifests:
        return ""
    return differing_files(read_manifest(store, old), manifests[new])
