"""A Ray cluster to work on: the one RAY_ADDRESS names, or a private one on this machine.

The private cluster is a child process with its own address and token, so that several runs can
share a machine; it dies with us, even on kill -9, and does not see the terminal's Ctrl-C.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

import psutil
import ray

from dist_tl.cluster.config import SessionConfig
from dist_tl.errors import WorkerError

START_TIMEOUT_S = 120.0
# One torch thread a worker; DeepSpeed on CPU even where a GPU exists but torch cannot see it.
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    "RAY_DEDUP_LOGS": "0",
    # Ray hides the GPUs of actors that ask for none; DeepSpeed then finds no accelerator.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class RaySession:
    """Use as a context manager; inside, Ray is initialised.

    Raises:
        WorkerError: the cluster did not start, or the one RAY_ADDRESS names is out of reach.
    """

    def __init__(self, config: SessionConfig) -> None:
        self._config = config
        self._head: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._memory = _MemoryWatch()

    def __enter__(self) -> "RaySession":
        os.environ.update({k: os.environ.get(k, v) for k, v in WORKER_ENVIRONMENT.items()})
        address = os.environ.get("RAY_ADDRESS")
        try:
            if not address:
                address = self._start_head()
            self._connect(address)
        except BaseException:
            self.close()
            raise
        self._memory.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def peak_memory_bytes(self) -> int:
        """Largest sum of private memory seen over this process and its children."""
        return self._memory.peak_bytes

    def close(self) -> None:
        """Leave Ray; stop the private cluster. Safe to call twice."""
        self._memory.stop()
        if ray.is_initialized():
            ray.shutdown()
        if self._head is not None:
            _stop(self._head)
            self._head = None
            os.environ.pop("RAY_ADDRESS", None)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start_head(self) -> str:
        # Sockets live below this folder, and their paths have a limit of 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="dtl-", dir="/tmp"))
        port = _free_port()
        address = f"127.0.0.1:{port}"
        log = (self._folder / "head.log").open("wb")
        self._head = subprocess.Popen(
            _head_command(self._config, port, self._folder),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,
            # Ray Train asks the cluster of RAY_ADDRESS whether its controller lives; without it,
            # it may find another run's cluster and give up on a healthy worker group.
            env={**os.environ, "RAY_ADDRESS": address},
        )
        self._wait_until_up(port)
        return address

    def _wait_until_up(self, port: int) -> None:
        assert self._head is not None
        assert self._folder is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        ready = self._folder / "session_latest"
        while time.monotonic() < deadline:
            if self._head.poll() is not None:
                break
            if ready.exists() and _answers(port):
                return
            time.sleep(0.1)
        tail = (self._folder / "head.log").read_text(errors="replace")[-1500:]
        raise WorkerError(f"Ray did not start on this machine; its last words:\n{tail}")

    def _connect(self, address: str) -> None:
        os.environ["RAY_ADDRESS"] = address
        deadline = time.monotonic() + 60
        while True:
            try:
                ray.init(
                    address=address,
                    log_to_driver=False,
                    logging_level="ERROR",
                    runtime_env={"env_vars": {**WORKER_ENVIRONMENT, "RAY_ADDRESS": address}},
                )
                return
            except (ConnectionError, RuntimeError, ValueError) as error:
                if time.monotonic() > deadline:
                    raise WorkerError(
                        f"no Ray cluster answers at {address}: {error}; check RAY_ADDRESS, or "
                        "unset it to start one on this machine"
                    ) from None
                time.sleep(0.5)


def _head_command(config: SessionConfig, port: int, folder: Path) -> list[str]:
    ray_command = Path(sys.executable).with_name("ray")
    return [
        str(ray_command),
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        f"--num-cpus={config.num_cpus}",
        f"--object-store-memory={config.object_store_mb * 1024 * 1024}",
        "--include-dashboard=false",
        "--disable-usage-stats",
        f"--temp-dir={folder}",
    ]


def _die_with_parent() -> None:
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the head and everything it started; actors that linger are killed."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(timeout=3)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in family:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue


class _MemoryWatch:
    """Samples the memory of this process and all it started, once a second."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._watch, daemon=True, name="memory watch")
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(1.0):
            self.peak_bytes = max(self.peak_bytes, _family_memory())


def _family_memory() -> int:
    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total
