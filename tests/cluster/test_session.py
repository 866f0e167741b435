"""Private clusters are isolated, clean up after themselves, and do not leak secrets.

These clusters belong to separate programs and run next to the shared one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
from small_stages import wait_until

from dist_tl.cluster import session as session_module
from dist_tl.cluster.config import SessionConfig
from dist_tl.cluster.session import RaySession
from dist_tl.cluster.session_folder import _LONGEST
from dist_tl.errors import WorkerError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]
PROGRAM = Path(__file__).with_name("session_life.py")


def start(*endings):
    """Starts the program as a user without a cluster and with strict warnings."""
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *endings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "PYTHONWARNINGS": "error::DeprecationWarning",
        },
    )


def described(program):
    """Waits for the facts about the program's cluster."""
    line = program.stdout.readline()
    assert line, program.stderr.read()[-3000:]
    return json.loads(line)


def still_running(facts):
    commands = []
    for pid, created in facts["processes"]:
        try:
            process = psutil.Process(pid)
            if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
                commands.append(process.cmdline())
        except psutil.Error:
            continue
    return commands


@pytest.fixture(scope="module")
def neighbour(ray_local):
    """A named actor in the shared cluster, which other clusters must not see."""
    actor = ray.remote(threading.Event).options(name="ours", num_cpus=0).remote()
    ray.get(actor.is_set.remote())
    yield
    ray.kill(actor)


@pytest.fixture(scope="module")
def doomed(neighbour):
    """A program that waits in its cluster; starts in parallel to the others."""
    program = start("wait")
    yield program
    program.kill()
    program.communicate()


@pytest.fixture(scope="module")
def orphaned(doomed):
    """Facts about a cluster whose driver and watcher were both killed."""
    program = start("wait")
    facts = described(program)
    os.kill(facts["watcher"], signal.SIGKILL)
    program.kill()
    program.communicate()
    assert Path(facts["folder"]).exists(), "nobody is left to remove it"
    return facts


@pytest.fixture(scope="module")
def lives(doomed, orphaned):
    """Facts about two clusters that a program opened in sequence; both have ended."""
    program = start("raise", "lose")
    out, err = program.communicate(timeout=200)
    assert program.returncode == 0, err[-3000:]
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def life(lives):
    return lives[0]


@pytest.mark.parametrize("which", [0, 1], ids=["body raised", "head was killed"])
def test_a_session_leaves_no_process_and_no_folder(lives, which):
    facts = lives[which]
    assert len(facts["processes"]) > 3
    assert still_running(facts) == []
    assert not Path(facts["folder"]).exists()


def test_a_session_stops_with_its_driver_even_on_kill_9(doomed, lives):
    facts = described(doomed)
    assert len(still_running(facts)) > 3, "the sessions after it left it alone"
    doomed.kill()
    wait_until(lambda: still_running(facts) == [], timeout_s=15)
    wait_until(lambda: not Path(facts["folder"]).exists(), timeout_s=15)


def test_what_a_killed_driver_and_its_killed_watcher_left_goes_with_the_next_session(
    orphaned, lives
):
    assert still_running(orphaned) == []
    assert not Path(orphaned["folder"]).exists()


def test_nothing_of_a_session_can_be_reached_from_other_machines(life):
    addresses = {address.removeprefix("::ffff:") for address, _ in life["listening"]}
    assert len(life["listening"]) > 5
    assert addresses == {"127.0.0.1"}, life["listening"]


def test_sessions_on_one_machine_do_not_see_each_other(life, ray_local):
    assert life["cpus"] == 3
    assert life["others"] == []
    assert ray.cluster_resources()["CPU"] == 8
    assert [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)] == ["ours"]


def test_a_session_uses_no_fixed_port(life):
    # Ray's client server uses port 10001 by default; if that is taken, Ray stops.
    assert not any("--port=10001" in command for command in life["commands"])
    assert any("ray.util.client.server" in command for command in life["commands"])


def test_a_session_that_lost_its_head_raises(lives):
    assert "start the same job again" in lives[1]["noticed"]


def test_workers_have_the_secrets_of_the_environment_and_no_file_contains_them(life):
    assert life["secret_seen"]
    assert life["files_with_secrets"] == []
    assert "secret" not in life["runtime_env"].lower()
    assert "token" not in life["runtime_env"].lower()
    assert not any("secret" in word for command in life["commands"] for word in command)


def test_other_users_cannot_access_the_sockets(life):
    assert life["folder_mode"] == "0o700"


def test_the_sockets_fit_into_the_folder_that_was_chosen_for_them(life):
    parent = os.path.dirname(life["folder"])
    assert any(path.endswith("/plasma_store") for path in life["sockets"])
    assert max(len(path) - len(parent) for path in life["sockets"]) <= len(_LONGEST)


def test_an_unreachable_cluster_is_a_quick_error_and_keeps_the_running_one(ray_local, monkeypatch):
    monkeypatch.setattr(session_module, "CONNECT_TIMEOUT_S", 0.5)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # but does not listen
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        began = time.monotonic()
        with pytest.raises(WorkerError, match=f"no Ray cluster at {address}.*RAY_ADDRESS"):
            RaySession(SessionConfig()).__enter__()
    assert time.monotonic() - began < 5
    assert os.environ["RAY_ADDRESS"] == address
    assert ray.is_initialized()


def test_if_ray_does_not_start_the_error_shows_its_log(monkeypatch):
    command = [sys.executable, "-c", "import sys; sys.exit('no room for shared memory')"]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session_module, "_head_command", lambda *_: command)
    with pytest.raises(WorkerError, match="no room for shared memory"):
        RaySession(SessionConfig()).__enter__()


def test_peak_memory_includes_all_processes_of_the_session(ray_local):
    driver = psutil.Process().memory_info().rss
    wait_until(lambda: ray_local.peak_memory_bytes > driver)
