"""Attempts of a run: if several overlap, the latest one owns the run and the others stop.

An attempt creates the next free number below attempts/ (create-only) with a random token and reads
it back, so two attempts never share a number, even in a store that ignores create-only writes.
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
from typing import Any

from dist_tl.errors import StorageError, SupersededError
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore

CHECK_EVERY_S = 5.0
# An ID that all retries of one RayJob share: none of them reclaims a run from a later submission.
SUBMISSION = "DIST_TL_SUBMISSION"
SETTLE_S = 0.2  # longer than a second writer needs between its check and its write


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
            record = self.store.read_json(layout.attempt_key(latest))
            raise SupersededError(
                f"attempt {latest} of this run was started on "
                f"{record.get('host', 'another machine')} and supersedes attempt {self.number}, "
                "which stops. Committed work is kept; the later attempt resumes from it"
            )

    def poll(self) -> None:
        """Calls :meth:`check` at most every few seconds and ignores an unreachable store."""
        if time.monotonic() - self._checked_at > CHECK_EVERY_S:
            with contextlib.suppress(StorageError):
                self.check()


def latest_attempt(store: ObjectStore) -> int:
    """Returns the highest attempt number, or 0 if there is no attempt."""
    numbers = map(layout.parse_attempt, store.list(layout.ATTEMPTS))
    return max((number for number in numbers if number is not None), default=0)


def begin_attempt(store: ObjectStore) -> Attempt:
    """Creates the next attempt, which owns the run from then on.

    Raises:
        StorageError: the store rejects the request.
        SupersededError: this is a retry of a submission, and a later submission owns the run.
    """
    record = {
        "word": secrets.token_hex(8),
        "host": socket.gethostname(),
        "started": time.time(),
        "submission": os.environ.get(SUBMISSION, ""),
    }
    number = latest_attempt(store) + 1
    while True:
        if record["submission"]:
            _check_not_superseded(store, record["submission"], number)
        if _claim(store, number, record):
            return Attempt(store, number)
        number += 1


def _check_not_superseded(store: ObjectStore, submission: str, number: int) -> None:
    earlier = [store.read_json(layout.attempt_key(n)) for n in range(1, number)]
    submissions = [attempt.get("submission", "") for attempt in earlier]
    if submission in submissions and submissions[-1] != submission:
        raise SupersededError(
            f"attempt {number - 1} of this run was started on {earlier[-1].get('host')} and "
            "supersedes this submission, whose retries cannot succeed; delete this submission"
        )


def _claim(store: ObjectStore, number: int, record: dict[str, Any]) -> bool:
    key = layout.attempt_key(number)
    if store.exists(key) or not store.write_json(key, record, create_only=True):
        return False
    # A store that ignores create-only keeps the last writer's token.
    time.sleep(SETTLE_S)
    return store.read_json(key)["word"] == record["word"]
