"""Of several starts of a run the latest has it, whatever the store can do."""

import threading

import pytest

from dist_tl.errors import StorageError, SupersededError
from dist_tl.storage import attempts
from dist_tl.storage.attempts import SUBMISSION, Attempt, begin_attempt, latest_attempt
from dist_tl.storage.objects import ObjectStore


class Forgetful(ObjectStore):
    """Ignores create-only, as some stores do: the last writer wins."""

    def write(self, key, data, *, create_only=False):
        return super().write(key, data)

    def exists(self, key):
        return False


def test_numbers_count_up_and_the_latest_has_the_run(tmp_path):
    store = ObjectStore(tmp_path)
    assert latest_attempt(store) == 0
    first = begin_attempt(store)
    first.check()
    second = begin_attempt(store)
    assert (first.number, second.number, latest_attempt(store)) == (1, 2, 2)
    second.check()
    with pytest.raises(SupersededError, match=r"attempt 2 .* took it over; this one, attempt 1"):
        first.check()


def test_looking_costs_nothing_between_the_looks(tmp_path, monkeypatch):
    store = ObjectStore(tmp_path)
    first, _ = begin_attempt(store), begin_attempt(store)
    first.poll()
    monkeypatch.setattr(attempts, "LOOK_EVERY_S", 0.0)
    with pytest.raises(SupersededError):
        first.poll()


def test_retries_of_a_submission_go_on_until_a_later_one_has_the_run(tmp_path, monkeypatch):
    store = ObjectStore(tmp_path)
    monkeypatch.setenv(SUBMISSION, "first")
    begin_attempt(store)
    begin_attempt(store)  # a retry
    monkeypatch.setenv(SUBMISSION, "second")
    taken_over = begin_attempt(store)
    monkeypatch.setenv(SUBMISSION, "first")
    with pytest.raises(SupersededError, match=r"attempt 3 .* took it over from this submission"):
        begin_attempt(store)
    taken_over.check()
    monkeypatch.delenv(SUBMISSION)
    assert begin_attempt(store).number == 4  # by hand: whoever starts it knows
    monkeypatch.setenv(SUBMISSION, "second")
    with pytest.raises(SupersededError):
        begin_attempt(store)
    monkeypatch.setenv(SUBMISSION, "third")
    assert begin_attempt(store).number == 5


class Away(ObjectStore):
    """Out of reach."""

    def list(self, prefix):
        raise StorageError("nobody answers")


def test_looking_in_a_loop_does_not_mind_a_store_that_is_away(tmp_path, monkeypatch):
    monkeypatch.setattr(attempts, "LOOK_EVERY_S", 0.0)
    attempt = Attempt(Away(tmp_path), 1)
    attempt.poll()
    with pytest.raises(StorageError):
        attempt.check()


@pytest.mark.parametrize("kind", [ObjectStore, Forgetful])
def test_starts_at_the_same_moment_never_share_a_number(tmp_path, kind):
    found = []
    barrier = threading.Barrier(4)

    def start():
        store = kind(tmp_path)
        barrier.wait()
        found.append(begin_attempt(store).number)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 4
    assert max(found) == latest_attempt(ObjectStore(tmp_path))
