"""Following a RayJob: its log as it comes, its states as they change, and how it ended.

The log is that of the submitter pods, which repeat what the driver says. A thread reads them, so
that a silent log never hides a lost head; callbacks are called by the caller's own thread.
"""

import queue
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dist_tl.deploy.kube_api import PODS, RAY_JOBS, KubeApi, NoOutput, NotAllowed, Object
from dist_tl.errors import DistTLError, HeadLostError, JobDeletedError
from dist_tl.telemetry import redact

FAILED_CODE = 3  # failed, and can be started again
PATIENCE_S = 300.0  # without an answer of the API, before following is given up
DRAIN_S = 5.0  # for the last lines of a job that ended
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_LOST = "JobStatusCheckTimeoutExceeded"
_ENDED = ("Complete", "Failed")
_HAS_LOG = ("Running", "Succeeded", "Failed")
# The message goes on with the end of the log, which may speak of other exit codes.
_EXIT_CODE = re.compile(r"\bexit code (-?\d+)")
Tell = Callable[[str], None]


def status_of(ray_job: Object) -> Object:
    """The status of a RayJob, empty before the operator has seen it."""
    return ray_job.get("status") or {}


def has_ended(ray_job: Object) -> bool:
    """Whether the operator will start nothing more for a RayJob."""
    return status_of(ray_job).get("jobDeploymentStatus") in _ENDED


def lost_its_head(ray_job: Object) -> bool:
    """Whether the operator gave a RayJob up because its head said nothing for too long."""
    status = status_of(ray_job)
    return status.get("reason") == _LOST or _LOST in status.get("message", "")


def state_of(ray_job: Object) -> str:
    """What is told of a RayJob's state, e.g. `Running: RUNNING`."""
    if ray_job["metadata"].get("deletionTimestamp"):
        return "Deleting"
    status = status_of(ray_job)
    state = status.get("jobDeploymentStatus") or "New"
    parts = [status.get("jobStatus", "")]
    if state == "Failed":
        parts += [status.get("reason", ""), redact(status.get("message", "")).split("\n")[0][:300]]
    if state == "Suspended":
        parts = [f"{'waits in its queue' if _is_queued(ray_job) else 'starts when it is resumed'}"]
    said = ", ".join(part for part in parts if part)
    return f"{state}: {said}" if said else state


def exit_code(ray_job: Object) -> int | None:
    """The exit code of a RayJob; None while it may go on.

    Raises:
        HeadLost: it ended because its head did.
    """
    status = status_of(ray_job)
    state = status.get("jobDeploymentStatus")
    if state == "Suspended" and not _is_queued(ray_job):
        return FAILED_CODE
    if state not in _ENDED:
        return None
    if status.get("jobStatus") == "SUCCEEDED":
        return 0
    if lost_its_head(ray_job):
        raise HeadLostError(
            f"the head of {ray_job['metadata']['name']} said nothing for too long; submit again "
            "to go on from the last COMMIT"
        )
    found = _EXIT_CODE.search(status.get("message", ""))
    code = int(found[1]) if found else FAILED_CODE
    return code if 1 <= code <= 255 else FAILED_CODE


def follow(
    api: KubeApi, namespace: str, name: str, *, on_line: Tell, on_state: Tell, poll_s: float
) -> int:
    """Show the log and the states of a RayJob until it ends.

    Raises:
        HeadLost: it ended because its head did.
        JobDeleted: somebody deleted it.
        ConfigError: a right is missing.
        WorkerError: the API did not answer for PATIENCE_S.
    """
    log = SubmitterLog(api, namespace, name, poll_s=poll_s)
    states = _States(api, namespace, name, on_state)
    log.start()
    try:
        while (code := states.ask()) is None:
            log.pump(on_line, on_state, poll_s)
        log.drain(on_line, on_state)
    except (HeadLostError, JobDeletedError):
        log.drain(on_line, on_state)
        raise
    finally:
        log.leave()
    return code


class _States:
    """Asks for a RayJob and tells each of its states once."""

    def __init__(self, api: KubeApi, namespace: str, name: str, on_state: Tell) -> None:
        self._api, self._namespace, self._name = api, namespace, name
        self._on_state, self._told, self._answered_at = on_state, "", time.monotonic()

    def ask(self) -> int | None:
        try:
            ray_job = self._api.get(RAY_JOBS, self._namespace, self._name)
        except NoOutput:
            if time.monotonic() - self._answered_at > PATIENCE_S:
                raise
            self._tell("no answer of the Kubernetes API; the job goes on, asking again")
            return None
        self._answered_at = time.monotonic()
        if ray_job is None:
            raise JobDeletedError(
                f"{self._name} was deleted in namespace {self._namespace}, by stop or another "
                "submit; what was committed is kept, and submit goes on from there"
            )
        self._tell(state_of(ray_job))
        return exit_code(ray_job)

    def _tell(self, state: str) -> None:
        if state != self._told:
            self._told = state
            self._on_state(state)


class SubmitterLog:
    """The log of the submitter pods of one RayJob, each line once, oldest pod first."""

    def __init__(self, api: KubeApi, namespace: str, name: str, *, poll_s: float) -> None:
        self._api, self._namespace, self._poll_s = api, namespace, poll_s
        self._labels = f"app.kubernetes.io/instance={name},app.kubernetes.io/component=submitter"
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._pods: dict[str, _PodLog] = {}
        self._problem: str | None = None
        self._ending, self._stream = threading.Event(), None
        self._thread = threading.Thread(target=self._read_on, daemon=True, name="submitter log")

    def start(self) -> None:
        """Begin to read on in a thread."""
        self._thread.start()

    def pump(self, on_line: Tell, on_state: Tell, seconds: float) -> None:
        """Hand over lines as they come, for so long."""
        until = time.monotonic() + seconds
        with suppress(queue.Empty):
            while (left := until - time.monotonic()) > 0:
                on_line(self._lines.get(timeout=left))
        if self._problem is not None:
            on_state(self._problem)
            self._problem = None

    def drain(self, on_line: Tell, on_state: Tell) -> None:
        """Hand over what the ended job said last."""
        self._ending.set()
        until = time.monotonic() + DRAIN_S
        while self._thread.is_alive() and time.monotonic() < until:
            self.pump(on_line, on_state, 0.05)
        with suppress(queue.Empty):
            while True:
                on_line(self._lines.get_nowait())

    def leave(self) -> None:
        """End the thread, in the middle of a log if need be."""
        self._ending.set()
        if self._thread.is_alive() and self._stream is not None:
            with suppress(Exception):
                getattr(self._stream, "shutdown", self._stream.close)()

    def read(self, on_line: Tell, *, follow: bool) -> int:
        """Show what the pods have said that was not shown yet; the number of pods with a log.

        Raises:
            ConfigError: the right to read logs is missing.
            WorkerError: the API does not answer.
        """
        pods = self._api.select(PODS, self._namespace, self._labels)
        begun = [pod for pod in pods if pod.get("status", {}).get("phase") in _HAS_LOG]
        for pod in sorted(begun, key=lambda pod: str(pod["metadata"].get("creationTimestamp"))):
            log = self._pods.setdefault(pod["metadata"]["name"], _PodLog())
            if not log.is_read:
                self._read_pod(pod, log, on_line, follow)
        return len(begun)

    def _read_pod(self, pod: Object, log: "_PodLog", on_line: Tell, follow: bool) -> None:
        name, is_running = pod["metadata"]["name"], pod["status"]["phase"] == "Running"
        self._stream = self._api.open_log(
            self._namespace, name, follow=follow and is_running, since_s=log.since_s()
        )
        try:
            log.is_read = log.read(self._stream, on_line) and not is_running
        finally:
            self._stream.release_conn()

    def _read_on(self) -> None:
        is_last = False
        while not is_last:
            # Looked at first: a pod that ends meanwhile is read once more to its end.
            is_last = self._ending.is_set()
            try:
                self.read(self._lines.put, follow=not is_last)
            except NotAllowed as error:
                self._problem = f"no log: {error}"
                return
            except DistTLError:
                pass  # of a pod that went, or a server that will be back: asked again
            except Exception as error:
                # Whatever breaks here must not end the thread unseen.
                if not self._ending.is_set():
                    self._problem = f"the log stopped: {type(error).__name__}; reading it again"
            self._ending.wait(self._poll_s)


class _PodLog:
    """How far the log of one pod was read, by the timestamps of its lines."""

    def __init__(self) -> None:
        self.is_read = False
        self._last, self._last_at = ("", ""), 0.0

    def since_s(self) -> int | None:
        """Seconds that the next request reaches back, with room for clocks that differ."""
        return int(time.monotonic() - self._last_at) + 60 if self._last_at else None

    def read(self, stream: Any, on_line: Tell) -> bool:
        """Show each whole line once; False where the stream fell silent before its end.

        Raises:
            urllib3.exceptions.HTTPError: the connection broke; what broke off is read again.
        """
        from urllib3.exceptions import ReadTimeoutError

        rest = b""
        try:
            for chunk in stream.stream(65536):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._show(line.decode(errors="replace"), on_line)
        except ReadTimeoutError:
            return False
        if rest:
            self._show(rest.decode(errors="replace"), on_line)
        return True

    def _show(self, line: str, on_line: Tell) -> None:
        stamp, _, said = line.partition(" ")
        seconds, _, fraction = stamp.rstrip("Z").partition(".")
        # Zeros at the end are left out, so that stamps do not sort as they are.
        read = (seconds, fraction.ljust(9, "0"))
        if read > self._last:
            self._last, self._last_at = read, time.monotonic()
            on_line(said)


def _is_queued(ray_job: Object) -> bool:
    return QUEUE_LABEL in ray_job["metadata"].get("labels", {})
