"""Where a run was handed in: kept with the run, so that its other verbs find it. No secrets."""

import time
from typing import Literal

from pydantic import Field

from dist_tl.config import StrictModel
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import read_record


class Submission(StrictModel):
    """submission.json of a run: its latest."""

    where: Literal["ray", "kubernetes"]
    name: str = Field(description="Of the job: its id, or the RayJob's name.")
    address: str | None = Field(default=None, description="Of Ray's dashboard.")
    namespace: str | None = Field(default=None, description="Of the RayJob.")
    generators_per_pod: int = Field(default=1, ge=1, description="On Kubernetes.")
    submitted: float = Field(default_factory=time.time, description="Unix time.")


def write_submission(store: ObjectStore, submission: Submission) -> None:
    """Remember where the run was handed in last.

    Raises:
        StorageError: the store refused.
    """
    store.write(layout.SUBMISSION, submission.model_dump_json(indent=1).encode())


def read_submission(store: ObjectStore) -> Submission | None:
    """Where the run was handed in last; None where it was started by hand.

    Raises:
        ConfigError: the file is damaged.
    """
    return read_record(store, layout.SUBMISSION, Submission, remedy="submit again")
