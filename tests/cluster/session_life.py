"""A program that opens private clusters in sequence and describes each. Run by a test.

    python session_life.py ENDING [ENDING ...]

ENDING is `raise` (the body raises), `lose` (the head is killed) or `wait` (until this program is
killed). Prints one line of JSON per cluster.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from dist_tl.cluster.config import SessionConfig
from dist_tl.cluster.session import RaySession
from dist_tl.errors import WorkerError

SECRET = "a-secret-that-must-stay-in-memory"


def read_secret():
    return os.environ.get("AWS_SECRET_ACCESS_KEY")


def describe(session):
    import ray

    ray.get(ray.remote(read_secret).remote())
    folder = str(session._folder)
    commands = commands_of(psutil.Process().children(recursive=True))
    return {
        "folder": folder,
        "sockets": [str(path) for path in Path(folder).glob("ray/session_2*/sockets/*")],
        "folder_mode": oct(os.stat(folder).st_mode & 0o777),
        "watcher": session._watcher.pid,
        "listening": listening([psutil.Process(), *commands]),
        "processes": [[process.pid, process.create_time()] for process in commands],
        "commands": list(commands.values()),
        "cpus": ray.cluster_resources()["CPU"],
        "others": ray.util.list_named_actors(all_namespaces=True),
        "secret_seen": ray.get(ray.remote(read_secret).remote()) == SECRET,
        "runtime_env": str(ray.get_runtime_context().runtime_env),
        "files_with_secrets": [name for secret in secrets() for name in files_with(secret, folder)],
    }


def commands_of(processes):
    """Returns the command of every process that is still there."""
    commands = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):  # the watcher runs short commands
            commands[process] = process.cmdline()
    return commands


def listening(processes):
    """Returns [address, process] of every socket that others could send to."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found += [
                [connection.laddr.ip, process.name()]
                for connection in process.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM
            ]
    return found


def secrets():
    return SECRET, os.environ["RAY_AUTH_TOKEN"]


def files_with(text, folder):
    found = subprocess.run(["grep", "-rlaF", text, folder], capture_output=True, text=True)
    return found.stdout.splitlines()


def lose_head(session):
    session._head.kill()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            session.check()
        except WorkerError as error:
            return str(error)
        time.sleep(0.05)
    return "no error"


def live(ending):
    with RaySession(SessionConfig(num_cpus=3, object_store_mb=80)) as session:
        session.check()
        facts = describe(session)
        if ending == "lose":
            facts["noticed"] = lose_head(session)
        print(json.dumps(facts), flush=True)
        if ending == "wait":
            time.sleep(600)
        if ending == "raise":
            raise KeyError("out of the body")


def main():
    os.environ["AWS_SECRET_ACCESS_KEY"] = SECRET
    before = dict(os.environ)
    for ending in sys.argv[1:]:
        with contextlib.suppress(KeyError):
            live(ending)
        assert dict(os.environ) == before, "the environment is restored"


if __name__ == "__main__":
    main()
