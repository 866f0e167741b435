"""A Ray cluster of several nodes on one machine, as Kubernetes would start it.

Every node is a process group of its own with its own resources; the head has no CPUs, the others
have roles; token authentication is on.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import dist_tl

RAY = str(Path(sys.executable).with_name("ray"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RayNodes:
    """Use as a context manager."""

    def __init__(self, folder, environment):
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))},
            **environment,
            # Jobs start as they would in an image: by the first python, with the package in reach.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(Path(dist_tl.__file__).parents[1]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "DS_ACCELERATOR": "cpu",
        }
        self._folder = folder
        self._nodes = {}
        self.gcs = f"127.0.0.1:{free_port()}"
        self.address = f"http://127.0.0.1:{free_port()}"

    def __enter__(self):
        self._start(
            "head",
            "--head",
            f"--port={self.gcs.rpartition(':')[2]}",
            f"--dashboard-port={self.address.rpartition(':')[2]}",
            f"--ray-client-server-port={free_port()}",
            "--include-dashboard=true",
            "--num-cpus=0",
            # Sockets lie below it, and their paths have a limit of 107 bytes.
            f"--temp-dir={self._folder}",
        )
        self._wait(lambda: self._answers(), "the head")
        return self

    def __exit__(self, *_):
        for name in list(self._nodes):
            self.kill(name)

    def add(self, name, role, cpus):
        """Start a node that offers one role; returns once the cluster knows it."""
        before = len(self.nodes())
        resources = json.dumps({role: 1000, name: 1})
        self._start(name, f"--address={self.gcs}", f"--num-cpus={cpus}", f"--resources={resources}")
        self._wait(lambda: len(self.nodes()) > before, name)

    def kill(self, name):
        """End a node and everything on it at once, as a machine that goes away."""
        process = self._nodes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def nodes(self):
        """Nodes alive, as Ray lists them."""
        return [row for row in self._list("nodes") if row["state"] == "ALIVE"]

    def actors(self, kind):
        """Names of the nodes on which live actors of a class are."""
        names = {row["node_id"]: row for row in self.nodes()}
        found = []
        for row in self._list("actors"):
            if row["class_name"] == kind and row["state"] == "ALIVE" and row["node_id"] in names:
                total = names[row["node_id"]]["resources_total"]
                found.append(next((n for n in self._nodes if n in total), "head"))
        return sorted(found)

    def metrics(self):
        """What all nodes tell Prometheus, as text."""
        place = self._folder / "prom_metrics_service_discovery.json"
        targets = [t for group in json.loads(place.read_text()) for t in group["targets"]]
        found = []
        for target in targets:
            # A node that was killed stays on the list for a while.
            with contextlib.suppress(OSError):
                answer = urllib.request.urlopen(f"http://{target}/metrics", timeout=5)
                found.append(answer.read().decode())
        return "\n".join(found)

    def _start(self, name, *arguments):
        log = (self._folder / f"{name}.log").open("wb")
        self._nodes[name] = subprocess.Popen(
            [
                RAY,
                "start",
                "--block",
                "--node-ip-address=127.0.0.1",
                "--object-store-memory=100000000",
                "--disable-usage-stats",
                *arguments,
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=self.environment,
        )

    def _list(self, what):
        done = subprocess.run(
            [RAY, "list", what, "--format=json", "--detail", f"--address={self.address}"],
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=60,
        )
        # In words where there is nothing.
        return json.loads(done.stdout) if done.stdout.startswith("[") else []

    def _answers(self):
        try:
            host, port = self.address.removeprefix("http://").split(":")
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            return False
        return len(self.nodes()) == 1

    def _wait(self, ready, what, timeout_s=90):
        deadline = time.monotonic() + timeout_s
        while not ready():
            for name, process in self._nodes.items():
                assert process.poll() is None, (self._folder / f"{name}.log").read_text()[-3000:]
            assert time.monotonic() < deadline, f"{what} did not come up"
            time.sleep(0.3)
