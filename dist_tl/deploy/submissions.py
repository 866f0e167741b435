"""Records where a run was submitted, in the run's store: `dist-tl status` and others read it."""

import time
from typing import Literal

from pydantic import Field

from dist_tl.config import StrictModel
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import read_record, write_record


class Submission(StrictModel):
    """Latest submission of a run (`submission.json`). Contains no secrets."""

    backend: Literal["ray", "kubernetes"] = Field(description="System that runs the job.")
    name: str = Field(description="Submission id of the Ray job, or name of the RayJob.")
    address: str | None = Field(default=None, description="URL of Ray's dashboard.")
    namespace: str | None = Field(default=None, description="Namespace of the RayJob.")
    generators_per_pod: int = Field(
        default=1, ge=1, description="Generator workers per pod, on Kubernetes."
    )
    submitted: float = Field(default_factory=time.time, description="Unix time of submission.")


def write_submission(store: ObjectStore, submission: Submission) -> None:
    """Stores the latest submission of a run.

    Raises:
        StorageError: the store cannot be written.
    """
    write_record(store, layout.SUBMISSION, submission)


def read_submission(store: ObjectStore) -> Submission | None:
    """Returns the latest submission of a run, or None if the run was never submitted.

    Raises:
        ConfigError: `submission.json` is damaged.
    """
    return read_record(store, layout.SUBMISSION, Submission, remedy="submit again")
