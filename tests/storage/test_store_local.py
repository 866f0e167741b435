"""A folder as a store: atomic writes, and exactly one winner of concurrent create-only writes."""

import errno
import multiprocessing
import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest

from dist_tl.errors import StorageError
from dist_tl.storage.objects import ObjectStore


class KilledError(BaseException):
    """Simulates the death of the process: no handler may catch it."""


@pytest.fixture
def store(tmp_path):
    return ObjectStore(tmp_path / "run")


def every_file(store):
    return sorted(str(path.relative_to(store.url)) for path in Path(store.url).rglob("*.*"))


@pytest.mark.parametrize("call", ["replace", "link", "fsync"])
def test_a_write_interrupted_before_it_is_published_changes_nothing(store, monkeypatch, call):
    store.write("a/k", b"old")

    def die(*_, **__):
        raise KilledError

    monkeypatch.setattr(os, call, die)
    with pytest.raises(KilledError):
        store.write("a/new" if call == "link" else "a/k", b"new", create_only=call == "link")
    monkeypatch.undo()
    assert store.list() == ["a/k"]
    assert store.read("a/k") == b"old"
    assert every_file(store) == []


def test_data_is_flushed_before_the_rename(store, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def record(*args, name=name, real=real):
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, record)
    store.write("k", b"x")
    replaced = calls.index("replace")
    assert "fsync" in calls[:replaced], "the file must be flushed before the rename"
    assert "fsync" in calls[replaced:], "the folder must be flushed after it"


def _write_forever(url):
    store = ObjectStore(url)
    for i in range(10**9):
        store.write("k", bytes([i % 256]) * 3_000_000)


def test_a_killed_writer_leaves_a_complete_object(store):
    context = multiprocessing.get_context("fork")
    for _ in range(4):
        writer = context.Process(target=_write_forever, args=(store.url,))
        writer.start()
        deadline = time.monotonic() + 10
        while not store.exists("k") and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.013)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        data = store.read("k")
        assert len(data) == 3_000_000
        assert data == data[:1] * 3_000_000
        assert store.list() == ["k"]


def test_readers_never_see_partial_writes(store):
    store.write("k", b"\x00" * 400_000)
    done = threading.Event()

    def write():
        for i in range(40):
            store.write("k", bytes([i]) * 400_000)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        data = store.read("k")
        assert data == data[:1] * 400_000
    writer.join()


def _race(url, names, results):
    store = ObjectStore(url)
    for i in names:
        results.put(
            (
                i,
                os.getpid(),
                store.write(f"race/{i}", str(os.getpid()).encode() * 999, create_only=True),
            )
        )


def test_exactly_one_of_many_processes_creates_each_key(store):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    racers = [context.Process(target=_race, args=(store.url, range(30), results)) for _ in range(4)]
    for racer in racers:
        racer.start()
    outcome = [results.get(timeout=60) for _ in range(30 * len(racers))]
    for racer in racers:
        racer.join()
    for i in range(30):
        [winner] = [pid for name, pid, won in outcome if name == i and won]
        assert store.read(f"race/{i}") == str(winner).encode() * 999


def test_exactly_one_of_many_threads_creates_a_key(store):
    for i in range(20):
        barrier, wins = threading.Barrier(8), []

        def race(me, i=i, barrier=barrier, wins=wins):
            barrier.wait()
            if store.write(f"k{i}", str(me).encode(), create_only=True):
                wins.append(me)

        threads = [threading.Thread(target=race, args=(me,)) for me in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [winner] = wins
        assert store.read(f"k{i}") == str(winner).encode()


def test_leftover_uploads_are_deleted_but_not_listed(store):
    store.write("a/k", b"x")
    for name in (".tmp-1", ".rclone_temp_put_1", ".rclone_multipart_upload_1"):
        Path(store.url, "a", name).write_bytes(b"half")
    assert store.list() == ["a/k"]
    store.delete_all("a")
    assert not Path(store.url, "a").exists()


def test_objects_follow_the_umask(store):
    old = os.umask(0o027)
    try:
        store.write("k", b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE(Path(store.url, "k").stat().st_mode) == 0o640


def test_a_disk_without_hard_links_works_and_the_probe_reports_it(store, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    assert store.write("k", b"one", create_only=True) is True
    assert store.write("k", b"two", create_only=True) is False
    assert store.read("k") == b"one"
    assert store.probe().create_only is False


def test_a_full_disk_error_names_the_path_and_the_remedy(store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*run/k: .*No space.*free some space"):
        store.write("k", b"x")
    with pytest.raises(StorageError, match="free some space"):
        store.probe()


def test_a_file_and_a_folder_with_the_same_name_are_an_error(store):
    store.write("a/b", b"x")
    with pytest.raises(StorageError, match=r"cannot write .*cannot share a name"):
        store.write("a", b"y")
    with pytest.raises(StorageError, match=r"cannot write .*cannot share a name"):
        store.write("a/b/c", b"y")


def test_the_probe_rejects_a_store_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"):
        ObjectStore(tmp_path / "file" / "run").probe()
