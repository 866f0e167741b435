"""The Ray cluster of a job: the cluster at RAY_ADDRESS, or a private one on this machine.

The private cluster is a child process with its own address and token, so several runs can share a
machine. It stops with this process, even on kill -9, and does not receive the terminal's Ctrl-C.
"""

import ctypes
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import get_args

import psutil
import ray

from dist_tl.cluster.config import SessionConfig
from dist_tl.cluster.roles import Role
from dist_tl.cluster.session_folder import new_session_folder
from dist_tl.errors import ConfigError, WorkerError

logger = logging.getLogger(__name__)
START_TIMEOUT_S = 120.0
CONNECT_TIMEOUT_S = 10.0
# Defaults of this process and Ray's processes; the user's environment takes precedence.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    "RAY_DEDUP_LOGS": "0",
    # Otherwise Ray hides GPUs from actors that reserve none, and DeepSpeed finds no accelerator.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


# The single node of a private cluster has all roles; actors request a small amount of theirs.
_ALL_ROLES = dict.fromkeys(get_args(Role), 1000)
# Ray's own code raises warnings; with warnings as errors, Ray would not start.
WARNINGS = {"PYTHONWARNINGS": "ignore::FutureWarning"}
# Only the driver does without it: it shows where a worker crashed.
IN_WORKERS = {"RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "0"}


class RaySession:
    """Context manager in which Ray is initialised. Restores the environment on exit.

    Args:
        watch: called by every :meth:`check`; raises an error to stop the run.

    Raises:
        WorkerError: the cluster did not start, or the cluster at RAY_ADDRESS is unreachable.
        ConfigError: the nodes at RAY_ADDRESS have roles, but `session.roles` is false.
    """

    def __init__(self, config: SessionConfig, *, watch: Callable[[], None] = lambda: None) -> None:
        self._config, self._watch = config, watch
        self._head: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._environment_before: dict[str, str | None] = {}
        self._is_connected = False
        self._memory = _MemoryMonitor()

    def __enter__(self) -> "RaySession":
        try:
            self._set_environment({k: os.environ.get(k, v) for k, v in ENVIRONMENT.items()})
            address = os.environ.get("RAY_ADDRESS") or self._start_head()
            # Ray Train checks its controller on the cluster at RAY_ADDRESS. If unset, it may find
            # another run's cluster and stop a healthy worker group.
            self._set_environment({"RAY_ADDRESS": address})
            with _interruptible():
                _connect(address)
            self._is_connected = True
            self._check_roles()
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

    def check(self) -> None:
        """Calls `watch` and checks that the private cluster is alive.

        Raises:
            WorkerError: the cluster has stopped; the message ends with its log.
        """
        self._watch()
        if self._head is not None and self._head.poll() is not None:
            raise WorkerError(
                "Ray stopped on this machine; start the same job again to resume from the last "
                f"commit. End of its log:\n{self._log_tail()}"
            )

    def _check_roles(self) -> None:
        offered = sorted(set(get_args(Role)) & set(ray.cluster_resources()))
        if offered and not self._config.roles:
            raise ConfigError(
                f"session.roles: the nodes of this cluster have roles ({', '.join(offered)}), but "
                "actors would ignore them: add session.roles=true"
            )
        if self._config.roles and not offered:
            logger.warning(
                "no node of the cluster offers a role yet; actors are pending until such a node "
                "joins, e.g. by ray start --resources='{\"trainers\": 1000}'"
            )

    @property
    def roles(self) -> bool:
        """Whether the cluster's nodes have roles."""
        return self._config.roles

    @property
    def peak_memory_bytes(self) -> int:
        """Peak memory of this process and its children; shared pages are counted once."""
        return self._memory.peak_bytes

    def close(self) -> None:
        """Shuts down Ray and the private cluster. Safe to call twice."""
        self._memory.stop()
        if self._is_connected:
            ray.shutdown()
            self._is_connected = False
        if self._head is not None:
            _stop(self._head)
            self._head = None
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.wait()
            self._watcher = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        for key, value in self._environment_before.items():
            set_variable(key, value)
        self._environment_before.clear()

    def _set_environment(self, variables: dict[str, str]) -> None:
        for key, value in variables.items():
            self._environment_before.setdefault(key, os.environ.get(key))
            os.environ[key] = value

    def _start_head(self) -> str:
        # Ray opens its own folder to all users; this private parent folder keeps them out.
        self._folder = new_session_folder()
        port = _free_port()
        address = f"127.0.0.1:{port}"
        with (self._folder / "head.log").open("wb") as log:
            self._head = subprocess.Popen(
                _head_command(self._config, port, self._folder / "ray"),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=partial(_exit_with, os.getpid()),
                env={**os.environ, **WARNINGS, **IN_WORKERS, "RAY_ADDRESS": address},
            )
        self._watcher = _start_watcher(self._head.pid, self._folder)
        self._wait_until_ready(port)
        return address

    def _wait_until_ready(self, port: int) -> None:
        assert self._head is not None
        assert self._folder is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        ready = self._folder / "ray" / "session_latest"
        while time.monotonic() < deadline:
            if self._head.poll() is not None:
                break
            if ready.exists() and is_listening("127.0.0.1", port):
                return
            time.sleep(0.1)
        raise WorkerError(f"Ray did not start on this machine; end of its log:\n{self._log_tail()}")

    def _log_tail(self) -> str:
        assert self._folder is not None, "the folder is created before the head starts"
        return (self._folder / "head.log").read_text(errors="replace")[-1500:]


def set_variable(key: str, value: str | None) -> None:
    """Sets a variable of this process' environment; None removes it."""
    if value is None:
        os.environ.pop(key, None)
    else:
        os.environ[key] = value


def _connect(address: str) -> None:
    _wait_for_listener(address)
    # No secrets here: others can read the runtime environment of a Ray job.
    variables = {key: os.environ[key] for key in (*ENVIRONMENT, "RAY_ADDRESS")}
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {**variables, **WARNINGS}},
            )
            return
        except (ConnectionError, RuntimeError, ValueError) as error:
            if time.monotonic() > deadline:
                raise _unreachable(address, str(error)) from None
            time.sleep(0.5)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM during `ray.init` behave as before and after it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # here neither Ray nor we can set a handler
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as interrupt:
        ray.shutdown()  # half of a connection makes Python crash when it exits
        if isinstance(interrupt, SystemExit):  # raised by Ray's handler, which has replaced ours
            signal.signal(signal.SIGTERM, handler)
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def _wait_for_listener(address: str) -> None:
    """Fails early: ray.init takes minutes to fail if nothing listens at the address."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdecimal():
        return  # "auto" or a URL, which Ray resolves
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while not is_listening(host.strip("[]"), int(port)):
        if time.monotonic() > deadline:
            raise _unreachable(address, "nothing listens there")
        time.sleep(0.5)


def _unreachable(address: str, reason: str) -> WorkerError:
    return WorkerError(
        f"no Ray cluster at {address}: {reason}; check RAY_ADDRESS, or unset it to start one on "
        "this machine"
    )


def _head_command(config: SessionConfig, port: int, folder: Path) -> list[str]:
    ray_command = Path(sys.executable).with_name("ray")
    return [
        str(ray_command),
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        # The default is a fixed port, and Ray does not start if another program uses it.
        f"--ray-client-server-port={_free_port()}",
        f"--num-cpus={config.num_cpus}",
        f"--object-store-memory={config.object_store_mb * 1024 * 1024}",
        "--include-dashboard=false",
        "--include-log-monitor=false",
        "--no-monitor",
        "--disable-usage-stats",
        f"--temp-dir={folder}",
        *([f"--resources={json.dumps(_ALL_ROLES)}"] if config.roles else []),
    ]


def _exit_with(parent: int) -> None:
    """Makes this child process receive SIGTERM when `parent` exits. Runs before exec."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_listening(host: str, port: int) -> bool:
    """Whether a TCP connection succeeds within two seconds."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def _stop(head: subprocess.Popen[bytes]) -> None:
    """Stops the head and all its child processes; returns once they have exited."""
    head.terminate()
    try:
        head.wait(timeout=3)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()
    # Children of a killed head lose their parent, but stay in its session.
    children = [process for process in psutil.process_iter() if _session_of(process) == head.pid]
    for process in children:
        with suppress(psutil.Error):
            process.kill()
    # Without an init process that reaps orphans they stay zombies, which count as dead.
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and not all(map(_is_dead, children)):
        time.sleep(0.05)


def _is_dead(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def _start_watcher(head_pid: int, folder: Path) -> subprocess.Popen[bytes]:
    """Starts a shell that kills the head's session and removes its folder if this process dies."""
    me = os.getpid()
    script = (
        f"alive() {{ kill -0 {me} && ! grep -q '^State:.Z' /proc/{me}/status; }} 2>/dev/null; "
        f"while alive; do sleep 1; done; "
        f"pkill -KILL -s {head_pid} || kill -KILL -- -{head_pid}; "
        f"sleep 1; rm -rf {shlex.quote(str(folder))}"
    )
    return subprocess.Popen(
        ["/bin/sh", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _session_of(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


class _MemoryMonitor:
    """Samples the memory of this process and its children, once a second."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._sample, daemon=True, name="memory monitor")
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _sample(self) -> None:
        while not self._stopped.wait(1.0):
            self.peak_bytes = max(self.peak_bytes, _process_tree_memory())


def _process_tree_memory() -> int:
    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total
