"""The processes of a private cluster: how they end, in every case, and the memory they take."""

import ctypes
import os
import shlex
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

# Marks the processes of a private cluster by its folder.
SESSION_FOLDER = "DIST_TL_SESSION_FOLDER"


def exit_with(parent: int) -> None:
    """Makes this child process receive SIGTERM when `parent` exits. Runs before exec."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def stop(head: subprocess.Popen[bytes]) -> None:
    """Stops the head and all its child processes; returns once they have exited."""
    head.terminate()
    try:
        head.wait(timeout=3)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()
    # Children of a killed head lose their parent, but stay in its session.
    _kill([process for process in psutil.process_iter() if _session_of(process) == head.pid])


def kill_processes_of(folder: Path) -> None:
    """Kills what is left of a private cluster whose driver and watcher were killed."""
    marked = {_session_of(p) for p in psutil.process_iter() if _folder_of(p) == str(folder)}
    # Ray's workers overwrite the mark with their title, but are in the session of the others.
    _kill([p for p in psutil.process_iter() if _session_of(p) in marked - {None, 0, os.getsid(0)}])


def _folder_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(SESSION_FOLDER)
    except (psutil.Error, OSError):
        return None


def _kill(processes: list[psutil.Process]) -> None:
    """Kills processes; returns once they have exited."""
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    # Without an init process that reaps orphans they stay zombies, which count as dead.
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and not all(map(_is_dead, processes)):
        time.sleep(0.05)


def _is_dead(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def start_watcher(head_pid: int, folder: Path) -> subprocess.Popen[bytes]:
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


class MemoryMonitor:
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
