"""Attempts: the latest attempt owns the run, with or without create-only writes."""

import threading
import time

import pytest

from dist_tl.errors import StorageError, SupersededError
from dist_tl.storage import attempts
from dist_tl.storage.attempts import SUBMISSION, Attempt, begin_attempt, latest_attempt
from dist_tl.storage.layout import ATTEMPTS
from dist_tl.storage.objects import ObjectStore


class SlowStore(ObjectStore):
    """Writes long after it listed, and ignores create-only, like some stores."""

    def write(self, key, data, *, create_only=False):
        time.sleep(self.delay)
        return super().write(key, data)


def test_numbers_count_up_and_the_latest_attempt_owns_the_run(tmp_path):
    store = ObjectStore(tmp_path)
    assert latest_attempt(store) == 0
    first = begin_attempt(store)
    first.check()
    second = begin_attempt(store)
    assert (first.number, second.number, latest_attempt(store)) == (1, 2, 2)
    second.check()
    with pytest.raises(SupersededError, match=r"attempt 2 .* supersedes attempt 1, which stops"):
        first.check()


def test_poll_reads_the_store_at_most_every_few_seconds(tmp_path, monkeypatch):
    store = ObjectStore(tmp_path)
    first, _ = begin_attempt(store), begin_attempt(store)
    first.poll()
    monkeypatch.setattr(attempts, "CHECK_EVERY_S", 0.0)
    with pytest.raises(SupersededError):
        first.poll()


def test_retries_of_a_submission_run_until_they_are_superseded(tmp_path, monkeypatch):
    store = ObjectStore(tmp_path)
    monkeypatch.setenv(SUBMISSION, "first")
    begin_attempt(store)
    begin_attempt(store)  # a retry
    monkeypatch.setenv(SUBMISSION, "second")
    superseding = begin_attempt(store)
    monkeypatch.setenv(SUBMISSION, "first")
    with pytest.raises(SupersededError, match=r"attempt 3 .* supersedes this submission"):
        begin_attempt(store)
    superseding.check()
    monkeypatch.delenv(SUBMISSION)
    assert begin_attempt(store).number == 4  # started manually, not a retry
    monkeypatch.setenv(SUBMISSION, "second")
    with pytest.raises(SupersededError):
        begin_attempt(store)
    monkeypatch.setenv(SUBMISSION, "third")
    assert begin_attempt(store).number == 5


class UnreachableStore(ObjectStore):
    """Every listing fails."""

    def list(self, prefix=""):
        raise StorageError("unreachable")


def test_poll_ignores_an_unreachable_store_and_check_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(attempts, "CHECK_EVERY_S", 0.0)
    attempt = Attempt(UnreachableStore(tmp_path), 1)
    attempt.poll()
    with pytest.raises(StorageError):
        attempt.check()


@pytest.mark.parametrize("delays", [(0, 0, 0, 0), (0, 0.1, 0.3, 0.3)])
def test_concurrent_attempts_never_share_a_number(tmp_path, delays):
    numbers = []
    barrier = threading.Barrier(len(delays))

    def start(delay):
        store = SlowStore(tmp_path)
        store.delay = delay
        barrier.wait()
        numbers.append(begin_attempt(store).number)

    threads = [threading.Thread(target=start, args=(delay,)) for delay in delays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(numbers)) == len(delays)
    assert max(numbers) == latest_attempt(ObjectStore(tmp_path))
    # An attempt that met another took its record back.
    assert len(ObjectStore(tmp_path).list(ATTEMPTS)) == len(delays)
