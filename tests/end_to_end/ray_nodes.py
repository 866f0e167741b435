"""A Ray cluster of several nodes on one machine, as Kubernetes would start it.

Every node is a process group of its own with its own resources and, where the machine allows it,
network; the head has no CPUs, the others have roles; token authentication is on.
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
from pathlib import Path
from urllib.parse import urlsplit

import dist_tl
from dist_tl.deploy import pods

# Prints what the addresses given tell Prometheus; a node that was killed stays listed for a while.
SCRAPE = """
import contextlib, sys, urllib.request
for target in sys.argv[1:]:
    with contextlib.suppress(OSError):
        print(urllib.request.urlopen(f"http://{target}/metrics", timeout=5).read().decode())
"""
RAY = str(Path(sys.executable).with_name("ray"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RayNodes:
    """Use as a context manager.

    Args:
        network: where the nodes are.
        environment: of a store on this process' loopback.
    """

    def __init__(self, folder, network, environment):
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        reached = f"http://{network.reach(urlsplit(environment['AWS_ENDPOINT_URL']).port)}"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))},
            **environment,
            "AWS_ENDPOINT_URL": reached,
            **dict.fromkeys(("NO_PROXY", "no_proxy"), f"{environment['NO_PROXY']},10.77.0.0/24"),
            # Jobs start as they would in an image: by the first python, with the package in reach.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(Path(dist_tl.__file__).parents[1]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "TORCHDYNAMO_DISABLE": "1",
            "DS_ACCELERATOR": "cpu",
            # As in pods: how soon a machine is missed that vanished without a word.
            **{k: v for k, v in pods.ENVIRONMENT.items() if k != "HOME"},
        }
        self._folder, self._network = folder / "ray", network
        self._folder.mkdir()
        self._nodes = {}
        host = network.add("head")
        self.gcs = f"{host}:{free_port()}"
        self.address = f"http://{host}:{free_port()}"

    def __enter__(self):
        self._start(
            "head",
            self.gcs.rpartition(":")[0],
            "--head",
            f"--dashboard-host={self.gcs.rpartition(':')[0]}",
            f"--port={self.gcs.rpartition(':')[2]}",
            f"--dashboard-port={self.address.rpartition(':')[2]}",
            f"--ray-client-server-port={free_port()}",
            "--include-dashboard=true",
            "--num-cpus=0",
            # Sockets lie below it, and their paths have a limit of 107 bytes.
            f"--temp-dir={self._folder}",
        )
        try:
            self._wait(lambda: len(self.nodes()) == 1, "the head")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in list(self._nodes):
            self.kill(name)

    def add(self, name, role, cpus):
        """Start a node that offers one role; returns once the cluster knows it."""
        before = len(self.nodes())
        resources = json.dumps({role: 1000, name: 1})
        self._start(
            name,
            # Nodes that share Ray's folder unpack and delete each other's working directories.
            self._network.add(name, self._folder),
            f"--address={self.gcs}",
            f"--num-cpus={cpus}",
            f"--resources={resources}",
        )
        self._wait(lambda: len(self.nodes()) > before, name)

    def inside(self):
        """What goes before a command that should reach the nodes."""
        return self._network.inside()

    def kill(self, name):
        """End a node and everything on it at once, as a machine that goes away without a word."""
        self._network.cut(name)
        process = self._nodes.pop(name)
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
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
        return self._run(sys.executable, "-c", SCRAPE, *targets)

    def _start(self, name, address, *arguments):
        log = self._log(name).open("wb")
        self._nodes[name] = subprocess.Popen(
            [
                *self._network.inside(name),
                RAY,
                "start",
                "--block",
                f"--node-ip-address={address}",
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

    def _log(self, name):
        return self._folder.with_name(f"{name}.log")

    def _list(self, what):
        said = self._run(
            RAY, "list", what, "--format=json", "--detail", f"--address={self.address}"
        )
        # In words where there is nothing.
        return json.loads(said) if said.startswith("[") else []

    def _run(self, *command):
        done = subprocess.run(
            [*self.inside(), *command],
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=60,
        )
        return done.stdout

    def _wait(self, ready, what, timeout_s=90):
        deadline = time.monotonic() + timeout_s
        while not ready():
            for name, process in self._nodes.items():
                assert process.poll() is None, self._log(name).read_text()[-3000:]
            assert time.monotonic() < deadline, f"{what} did not come up"
            time.sleep(0.3)
