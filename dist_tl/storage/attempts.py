"""Attempts of a run: if several overlap, the latest one owns the run and the others stop.

An attempt writes the next number with a random token below attempts/ and lists the folder again. An
attempt that sees another with its number takes its record back and picks a higher one, so two never
share a number, however slow either is, in every store that lists what was written.
Before it commits a checkpoint, a result or a task output, an attempt checks for a later number.
Checkpoint keys contain the number, because two attempts may write different bytes. Another attempt
may begin between check and commit. Shards of pseudo samples are not fenced: their bytes are the
same for every writer. (This does not hold for predictions of a hub if one of two attempts lost an
expert.)
"""

import contextlib
import os
import secrets
import socket
import time

from pydantic import Field

from dist_tl.config import StrictModel
from dist_tl.errors import DamagedError, StorageError, SupersededError
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import read_record, write_record

CHECK_EVERY_S = 5.0
# An ID that all retries of one RayJob share: none of them reclaims a run from a later submission.
SUBMISSION = "DIST_TL_SUBMISSION"


class AttemptRecord(StrictModel):
    """When and where an attempt started. Empty if it cannot be read: the number is in its key."""

    host: str = "another machine"
    started: float | None = Field(default=None, description="Unix time, seconds.")
    submission: str = ""
    job: str = Field(default="", description="Fingerprint of the job and its inputs.")


class Attempt:
    """One attempt of a run.

    Attributes:
        store: the run's store.
        number: counts from 1; later attempts supersede earlier ones. 0 disables the check.
    """

    def __init__(self, store: ObjectStore, number: int) -> None:
        self.store, self.number = store, number
        self._checked_at = time.monotonic()

    def check(self) -> None:
        """Raises if a later attempt owns the run. Always reads the store; call it before a commit.

        Raises:
            SupersededError: names the later attempt and its machine.
        """
        self._checked_at = time.monotonic()
        if self.number == 0:
            return
        latest = latest_attempt(self.store)
        if latest > self.number:
            raise SupersededError(
                f"attempt {latest} of this run was started on {latest_record(self.store).host} and "
                f"supersedes attempt {self.number}, which stops. Committed work is kept; the later "
                "attempt resumes from it"
            )

    def poll(self) -> None:
        """Calls :meth:`check` at most every few seconds and ignores an unreachable store."""
        if time.monotonic() - self._checked_at > CHECK_EVERY_S:
            with contextlib.suppress(StorageError):
                self.check()


def latest_attempt(store: ObjectStore) -> int:
    """Returns the highest attempt number, or 0 if there is no attempt."""
    return max(_numbers(store).values(), default=0)


def latest_record(store: ObjectStore) -> AttemptRecord:
    """Returns the record of the latest attempt; an empty one if there is no attempt."""
    numbers = _numbers(store)
    return _read(store, max(numbers)) if numbers else AttemptRecord()


def begin_attempt(store: ObjectStore, job: str = "") -> Attempt:
    """Creates the next attempt, which owns the run from then on.

    Args:
        job: fingerprint of the job and its inputs.

    Raises:
        StorageError: the store rejects the request.
        SupersededError: this is a retry of a submission, and a later submission owns the run.
    """
    token = secrets.token_hex(8)
    record = AttemptRecord(
        host=socket.gethostname(),
        started=time.time(),
        submission=os.environ.get(SUBMISSION, ""),
        job=job,
    )
    numbers = _numbers(store)
    if record.submission:
        _check_not_superseded(store, record.submission, sorted(numbers))
    number = max(numbers.values(), default=0) + 1
    while True:
        key = layout.attempt_key(number, token)
        write_record(store, key, record)
        rivals = sorted(rival for rival, taken in _numbers(store).items() if taken == number)
        if rivals == [key]:
            return Attempt(store, number)
        # The rival may do the same: different steps keep the two from meeting again.
        store.delete(key)
        number += 1 + sum(rival < key for rival in rivals)


def _numbers(store: ObjectStore) -> dict[str, int]:
    numbers = {key: layout.parse_attempt(key) for key in store.list(layout.ATTEMPTS)}
    return {key: number for key, number in numbers.items() if number is not None}


def _check_not_superseded(store: ObjectStore, submission: str, keys: list[str]) -> None:
    earlier = [_read(store, key) for key in keys]
    submissions = [attempt.submission for attempt in earlier]
    if submission in submissions and submissions[-1] != submission:
        raise SupersededError(
            f"attempt {layout.parse_attempt(keys[-1])} of this run was started on "
            f"{earlier[-1].host} and supersedes this submission, whose retries cannot succeed; "
            "delete this submission"
        )


def _read(store: ObjectStore, key: str) -> AttemptRecord:
    try:
        return read_record(store, key, AttemptRecord, remedy="") or AttemptRecord()
    except DamagedError:
        return AttemptRecord()
