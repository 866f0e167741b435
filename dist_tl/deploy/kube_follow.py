"""Follows a RayJob: streams its log, reports state changes, and returns its exit code.

The log is that of the submitter pods, which print the output of the driver. A background thread
reads it, so a silent log never hides a lost head; callbacks run in the thread of the caller.
"""

import queue
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dist_tl.deploy.kube_api import (
    PODS,
    RAY_JOBS,
    ApiUnavailableError,
    ForbiddenError,
    KubeApi,
    Object,
)
from dist_tl.errors import DistTLError, HeadLostError, JobDeletedError
from dist_tl.telemetry import redact

FAILED_CODE = 3  # failed, but the same command resumes
PATIENCE_S = 300.0  # time without an API response after which following is given up
DRAIN_S = 5.0  # time to wait for the last log lines of a job that ended
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_LOST = "JobStatusCheckTimeoutExceeded"
_ENDED = ("Complete", "Failed")
_HAS_LOG = ("Running", "Succeeded", "Failed")
# First match only: the message continues with the end of the log, which may name other exit codes.
_EXIT_CODE = re.compile(r"\bexit code (-?\d+)")
TextCallback = Callable[[str], None]


def status_of(ray_job: Object) -> Object:
    """Returns the status of a RayJob; empty until the operator has seen it."""
    return ray_job.get("status") or {}


def has_ended(ray_job: Object) -> bool:
    """Returns whether a RayJob is final: the operator starts nothing more for it."""
    return status_of(ray_job).get("jobDeploymentStatus") in _ENDED


def lost_head(ray_job: Object) -> bool:
    """Returns whether the operator failed a RayJob because its head stopped responding."""
    status = status_of(ray_job)
    return status.get("reason") == _LOST or _LOST in status.get("message", "")


def state_of(ray_job: Object) -> str:
    """Returns the state of a RayJob as text, e.g. `Running: RUNNING`."""
    if ray_job["metadata"].get("deletionTimestamp"):
        return "Deleting"
    status = status_of(ray_job)
    state = status.get("jobDeploymentStatus") or "New"
    parts = [status.get("jobStatus", "")]
    if state == "Failed":
        parts += [status.get("reason", ""), redact(status.get("message", "")).split("\n")[0][:300]]
    if state == "Suspended":
        parts = ["waiting in its queue" if _is_queued(ray_job) else "waiting to be resumed"]
    details = ", ".join(part for part in parts if part)
    return f"{state}: {details}" if details else state


def exit_code(ray_job: Object) -> int | None:
    """Returns the exit code of a RayJob, or None if it has not ended yet.

    Raises:
        HeadLostError: the RayJob failed because its head was lost.
    """
    status = status_of(ray_job)
    state = status.get("jobDeploymentStatus")
    if state == "Suspended" and not _is_queued(ray_job):
        return FAILED_CODE
    if state not in _ENDED:
        return None
    if status.get("jobStatus") == "SUCCEEDED":
        return 0
    if lost_head(ray_job):
        raise HeadLostError(
            f"the head of {ray_job['metadata']['name']} stopped responding; submit again to resume "
            "from the last checkpoint"
        )
    match = _EXIT_CODE.search(status.get("message", ""))
    code = int(match[1]) if match else FAILED_CODE
    return code if 1 <= code <= 255 else FAILED_CODE


def follow(
    api: KubeApi,
    namespace: str,
    name: str,
    *,
    on_line: TextCallback,
    on_state: TextCallback,
    poll_s: float,
) -> int:
    """Streams log lines and states of a RayJob until it ends; returns its exit code.

    Raises:
        HeadLostError: the RayJob failed because its head was lost.
        JobDeletedError: the RayJob was deleted.
        ConfigError: a permission is missing.
        WorkerError: the API server did not respond for PATIENCE_S.
    """
    log = SubmitterLog(api, namespace, name, poll_s=poll_s)
    states = _StatePoller(api, namespace, name, on_state)
    log.start()
    try:
        while (code := states.poll()) is None:
            log.pump(on_line, on_state, poll_s)
        log.drain(on_line, on_state)
    except (HeadLostError, JobDeletedError):
        log.drain(on_line, on_state)
        raise
    finally:
        log.close()
    return code


class _StatePoller:
    """Polls a RayJob and reports each change of its state once."""

    def __init__(self, api: KubeApi, namespace: str, name: str, on_state: TextCallback) -> None:
        self._api, self._namespace, self._name = api, namespace, name
        self._on_state, self._reported, self._responded_at = on_state, "", time.monotonic()

    def poll(self) -> int | None:
        try:
            ray_job = self._api.get(RAY_JOBS, self._namespace, self._name)
        except ApiUnavailableError:
            if time.monotonic() - self._responded_at > PATIENCE_S:
                raise
            self._report("no response from the Kubernetes API; the job keeps running, retrying")
            return None
        self._responded_at = time.monotonic()
        if ray_job is None:
            raise JobDeletedError(
                f"{self._name} was deleted from namespace {self._namespace}, by stop or by another "
                "submit; committed work is kept, submit again to resume"
            )
        self._report(state_of(ray_job))
        return exit_code(ray_job)

    def _report(self, state: str) -> None:
        if state != self._reported:
            self._reported = state
            self._on_state(state)


class SubmitterLog:
    """Log of the submitter pods of one RayJob: each line once, oldest pod first."""

    def __init__(self, api: KubeApi, namespace: str, name: str, *, poll_s: float) -> None:
        self._api, self._namespace, self._poll_s = api, namespace, poll_s
        self._labels = f"app.kubernetes.io/instance={name},app.kubernetes.io/component=submitter"
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._pods: dict[str, _PodLog] = {}
        self._problem: str | None = None
        self._ending, self._stream = threading.Event(), None
        self._thread = threading.Thread(target=self._read_loop, daemon=True, name="submitter log")

    def start(self) -> None:
        """Starts the reader thread."""
        self._thread.start()

    def pump(self, on_line: TextCallback, on_state: TextCallback, seconds: float) -> None:
        """Passes on lines as they arrive, for `seconds`."""
        deadline = time.monotonic() + seconds
        with suppress(queue.Empty):
            while (left := deadline - time.monotonic()) > 0:
                on_line(self._lines.get(timeout=left))
        if self._problem is not None:
            on_state(self._problem)
            self._problem = None

    def drain(self, on_line: TextCallback, on_state: TextCallback) -> None:
        """Passes on the last lines of a job that ended."""
        self._ending.set()
        deadline = time.monotonic() + DRAIN_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            self.pump(on_line, on_state, 0.05)
        with suppress(queue.Empty):
            while True:
                on_line(self._lines.get_nowait())

    def close(self) -> None:
        """Ends the reader thread, even in the middle of a log."""
        self._ending.set()
        if self._thread.is_alive() and self._stream is not None:
            with suppress(Exception):
                getattr(self._stream, "shutdown", self._stream.close)()

    def read(self, on_line: TextCallback, *, follow: bool) -> int:
        """Passes on new lines of all pods; returns the number of pods that have a log.

        Raises:
            ConfigError: the permission to read logs is missing.
            WorkerError: the API server does not respond.
        """
        pods = self._api.select(PODS, self._namespace, self._labels)
        started = [pod for pod in pods if pod.get("status", {}).get("phase") in _HAS_LOG]
        for pod in sorted(started, key=lambda pod: str(pod["metadata"].get("creationTimestamp"))):
            log = self._pods.setdefault(pod["metadata"]["name"], _PodLog())
            if not log.is_complete:
                self._read_pod(pod, log, on_line, follow)
        return len(started)

    def _read_pod(self, pod: Object, log: "_PodLog", on_line: TextCallback, follow: bool) -> None:
        name, is_running = pod["metadata"]["name"], pod["status"]["phase"] == "Running"
        self._stream = self._api.open_log(
            self._namespace, name, follow=follow and is_running, since_s=log.since_s()
        )
        try:
            log.is_complete = log.read(self._stream, on_line) and not is_running
        finally:
            self._stream.release_conn()

    def _read_loop(self) -> None:
        is_last = False
        while not is_last:
            # Checked before reading: a pod that ends during the read is read once more to its end.
            is_last = self._ending.is_set()
            try:
                self.read(self._lines.put, follow=not is_last)
            except ForbiddenError as error:
                self._problem = f"no log: {error}"
                return
            except DistTLError:
                pass  # the pod is gone or the server is temporarily unavailable: retry
            except Exception as error:
                # No error may end the thread silently.
                if not self._ending.is_set():
                    self._problem = f"reading the log failed: {type(error).__name__}; retrying"
            self._ending.wait(self._poll_s)


class _PodLog:
    """Read position in the log of one pod, by the timestamps of its lines."""

    def __init__(self) -> None:
        self.is_complete = False
        self._last_stamp, self._last_at = ("", ""), 0.0

    def since_s(self) -> int | None:
        """Returns how many seconds the next request reaches back; includes 60 s of clock skew."""
        return int(time.monotonic() - self._last_at) + 60 if self._last_at else None

    def read(self, stream: Any, on_line: TextCallback) -> bool:
        """Passes on each complete line once; returns False if the stream timed out before its end.

        Raises:
            urllib3.exceptions.HTTPError: the connection broke; the incomplete line is read again.
        """
        from urllib3.exceptions import ReadTimeoutError

        rest = b""
        try:
            for chunk in stream.stream(65536):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._emit(line.decode(errors="replace"), on_line)
        except ReadTimeoutError:
            return False
        if rest:
            self._emit(rest.decode(errors="replace"), on_line)
        return True

    def _emit(self, line: str, on_line: TextCallback) -> None:
        timestamp, _, text = line.partition(" ")
        seconds, _, fraction = timestamp.rstrip("Z").partition(".")
        # Trailing zeros are omitted, so the raw timestamps do not sort as strings.
        stamp = (seconds, fraction.ljust(9, "0"))
        if stamp > self._last_stamp:
            self._last_stamp, self._last_at = stamp, time.monotonic()
            on_line(text)


def _is_queued(ray_job: Object) -> bool:
    return QUEUE_LABEL in ray_job["metadata"].get("labels", {})
