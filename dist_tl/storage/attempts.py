"""Attempts at a run: of several starts that overlap, the latest has the run, and the others stop.

A start writes the next free number below attempts/, create-only, with a word of its own in it, and
reads it back: so two starts never share a number, even in a store that ignores create-only. Before
it commits a checkpoint, a result or an answer, a start looks whether a later number exists.
Checkpoints carry the number, since of two starts they may differ. Between look and commit another
start may begin; and shards of pseudo-samples are not fenced at all: the bytes of either are the
same whoever writes them. (Not so for predictions of a hub that lost an expert to one of the two.)
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

LOOK_EVERY_S = 5.0
# A word that all tries of one RayJob share: none of them wins back a run that was taken over.
SUBMISSION = "DIST_TL_SUBMISSION"
SETTLE_S = 0.2  # longer than a second writer needs between looking and writing


class Attempt:
    """One start of a run.

    Attributes:
        store: of the run.
        number: from 1; a later one takes the run over. 0 is no start at all, and gives way to none.
    """

    def __init__(self, store: ObjectStore, number: int) -> None:
        self.store, self.number = store, number
        self._looked_at = time.monotonic()

    def check(self) -> None:
        """Raise if a later attempt has the run. Always looks: for use before a commit.

        Raises:
            SupersededError: naming the later attempt and its machine.
        """
        self._looked_at = time.monotonic()
        if self.number == 0:
            return
        latest = latest_attempt(self.store)
        if latest > self.number:
            told = self.store.read_json(layout.attempt_key(latest))
            raise SupersededError(
                f"attempt {latest} at this run was started on {told.get('host', 'another machine')}"
                f" and took it over; this one, attempt {self.number}, stops. Nothing is lost: what "
                "was committed is what the other goes on from"
            )

    def poll(self) -> None:
        """The same, looking every few seconds only, and not minding a store that is away."""
        if time.monotonic() - self._looked_at > LOOK_EVERY_S:
            with contextlib.suppress(StorageError):
                self.check()


def latest_attempt(store: ObjectStore) -> int:
    """The highest number; 0 where none was started."""
    numbers = map(layout.parse_attempt, store.list(layout.ATTEMPTS))
    return max((number for number in numbers if number is not None), default=0)


def begin_attempt(store: ObjectStore) -> Attempt:
    """Take the next free number, and with it the run.

    Raises:
        StorageError: the store refused.
        SupersededError: this is a new try of a submission that has lost the run to a later one.
    """
    mine = {
        "word": secrets.token_hex(8),
        "host": socket.gethostname(),
        "started": time.time(),
        "submission": os.environ.get(SUBMISSION, ""),
    }
    number = latest_attempt(store) + 1
    while True:
        if mine["submission"]:
            _check_not_taken_over(store, mine["submission"], number)
        if _taken(store, number, mine):
            return Attempt(store, number)
        number += 1


def _check_not_taken_over(store: ObjectStore, submission: str, number: int) -> None:
    earlier = [store.read_json(layout.attempt_key(n)) for n in range(1, number)]
    submissions = [start.get("submission", "") for start in earlier]
    if submission in submissions and submissions[-1] != submission:
        raise SupersededError(
            f"attempt {number - 1} at this run was started on {earlier[-1].get('host')} and took "
            "it over from this submission, which tries again in vain; delete this one"
        )


def _taken(store: ObjectStore, number: int, mine: dict[str, Any]) -> bool:
    key = layout.attempt_key(number)
    if store.exists(key) or not store.write_json(key, mine, create_only=True):
        return False
    # A store that ignores create-only keeps the last writer's word.
    time.sleep(SETTLE_S)
    return store.read_json(key)["word"] == mine["word"]
