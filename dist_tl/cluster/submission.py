"""Submits jobs to a running Ray cluster by its Jobs API.

The working directory of a submission contains only the resolved job file; the package is part of
the cluster's image. Ray reads its authentication token from the environment.
"""

import itertools
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import SplitResult, urlsplit

import ray
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from dist_tl.cluster.session import is_listening, set_variable
from dist_tl.errors import ConfigError, WorkerError
from dist_tl.telemetry import redact

POLL_S = 1.0
API_SERVER = "RAY_API_SERVER_ADDRESS"
UNREACHABLE_S = 120.0  # how long the cluster of a running job may be unreachable
RUN = "dist-tl/run"  # metadata key: URL of the run, since submission ids are not unique to it
JOB_FILE = "job.yaml"
ENTRYPOINT = f"python -m dist_tl run {JOB_FILE}"
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
Response = TypeVar("Response")
_TRANSIENT = re.compile(r"status code (429|5\d\d)")  # from a proxy, or while the dashboard starts
LOST_EXIT = 3  # for a job that ended without an exit code: it can be started again


class _UnreachableError(WorkerError):
    """The cluster did not respond; a retry may succeed."""


class RayJobs:
    """The Jobs API of one cluster.

    Args:
        address: URL of the cluster's dashboard, e.g. http://127.0.0.1:8265.

    Raises:
        ConfigError: the dashboard is unreachable, the token is wrong, or Ray's version differs.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        parts, port = _parse(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"--address: expected the URL of Ray's dashboard, e.g. http://127.0.0.1:8265, got "
                f"{redact(address)!r}"
            )
        if parts.username is not None or parts.password is not None:
            raise ConfigError(
                "--address: expected a URL without a login, since the run stores it; set Ray's "
                "token in RAY_AUTH_TOKEN, or in a file named by RAY_AUTH_TOKEN_PATH"
            )
        if not is_listening(parts.hostname, port or (443 if parts.scheme == "https" else 80)):
            raise ConfigError(
                f"nothing listens at {redact(address)}; is the cluster running, and its dashboard "
                "reachable (kubectl port-forward service/...-head-svc 8265)?"
            )
        logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
        self._client = _connect(address)
        self._check_version()

    def _check_version(self) -> None:
        response = self._request(lambda: self._client._do_request("GET", "/api/version").json())
        version = response.get("ray_version", "")
        if version.split(".")[:2] != ray.__version__.split(".")[:2]:
            raise ConfigError(
                f"the cluster at {self.address} runs Ray {version}, this is {ray.__version__}; "
                "install the same version on both sides"
            )

    def running(self, run: str) -> list[str]:
        """Returns the submission ids of the run's jobs that have not ended.

        Args:
            run: URL of the run.

        Raises:
            WorkerError: the cluster is unreachable.
        """
        return [
            job.submission_id
            for job in self._request(self._client.list_jobs)
            if job.submission_id is not None
            and (job.metadata or {}).get(RUN) == run
            and job.status not in ENDED
        ]

    def submit(self, job_text: str, run: str, label: str) -> str:
        """Submits a job; returns its submission id, the label and a number.

        Args:
            job_text: the job file.
            run: URL of the run.
            label: short name of the run, from the last part of its URL.

        Raises:
            WorkerError: the cluster rejected the job, or is unreachable.
        """
        taken = {job.submission_id for job in self._request(self._client.list_jobs)}
        number = next(n for n in itertools.count(1) if f"{label}--{n}" not in taken)
        with tempfile.TemporaryDirectory(prefix="dist_tl-submit-") as folder:
            (Path(folder) / JOB_FILE).write_text(job_text, encoding="utf-8")
            try:
                return self._request(
                    lambda: self._client.submit_job(
                        entrypoint=ENTRYPOINT,
                        submission_id=f"{label}--{number}",
                        runtime_env={"working_dir": folder},
                        metadata={RUN: run},
                    )
                )
            except ValueError as error:
                raise WorkerError(f"the cluster rejected the job: {redact(str(error))}") from None

    def follow(self, name: str, *, on_line: Callable[[str], None]) -> int:
        """Passes the job's log to `on_line` until the job ends; returns its exit code.

        Raises:
            WorkerError: the cluster does not know the job, or is unreachable.
        """
        shown = 0
        while True:
            info = self._request_with_retries(lambda: self._client.get_job_info(name))
            try:
                log = self._request_with_retries(lambda: self._client.get_job_logs(name))
            except WorkerError:
                if info.status not in ENDED:
                    raise
                return _exit_code(info)  # the exit code does not need the log
            # The last line may be incomplete.
            lines = log.splitlines()
            complete = len(lines) if info.status in ENDED or log.endswith("\n") else len(lines) - 1
            for line in lines[shown:complete]:
                on_line(line)
            shown = max(shown, complete)
            if info.status in ENDED:
                return _exit_code(info)
            time.sleep(POLL_S)

    def state(self, name: str) -> str:
        """Returns PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; after FAILED, the reason.

        Raises:
            WorkerError: the cluster does not know the job, or is unreachable.
        """
        info = self._request(lambda: self._client.get_job_info(name))
        message = f": {info.message}" if info.message and info.status == "FAILED" else ""
        return f"{info.status.value}{message}"

    def log(self, name: str) -> str:
        """Returns the job's log so far.

        Raises:
            WorkerError: the cluster does not know the job, or is unreachable.
        """
        return self._request(lambda: self._client.get_job_logs(name))

    def stop(self, name: str) -> None:
        """Stops the job; returns once it has ended.

        Raises:
            WorkerError: the cluster does not know the job, or is unreachable.
        """
        while self._request_with_retries(lambda: self._client.get_job_status(name)) not in ENDED:
            self._request_with_retries(
                lambda: self._client.stop_job(name)
            )  # a starting job ignores it
            time.sleep(POLL_S)

    def _request_with_retries(self, call: Callable[[], Response]) -> Response:
        deadline = time.monotonic() + UNREACHABLE_S
        while True:
            try:
                return self._request(call)
            except _UnreachableError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)

    def _request(self, call: Callable[[], Response]) -> Response:
        try:
            return call()
        except OSError as error:  # base class of the HTTP library's errors
            raise _UnreachableError(
                f"the cluster at {self.address} did not respond: {redact(str(error))[:300]}"
            ) from None
        except (RuntimeError, RayError) as error:
            if _TRANSIENT.search(str(error)):
                raise _UnreachableError(
                    f"the cluster at {self.address}: {redact(str(error))[:300]}"
                ) from None
            raise WorkerError(
                f"the cluster at {self.address} rejected the request: {redact(str(error))[:300]}"
            ) from None


def _parse(address: str) -> tuple[SplitResult, int | None]:
    try:
        parts = urlsplit(address)
        return parts, parts.port
    except ValueError as error:
        raise ConfigError(f"--address: {redact(address)!r} is not a URL: {error}") from None


def _connect(address: str) -> JobSubmissionClient:
    try:
        with _api_server_variable(address):
            return JobSubmissionClient(address)
    except Exception as error:  # Ray passes on any error of its transport
        text = redact(str(error))
        if any(word in text.lower() for word in ("auth", "token", "401", "403")):
            raise ConfigError(
                f"the cluster at {redact(address)} rejected the token; set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token"
            ) from None
        raise ConfigError(f"{redact(address)} is not a Ray dashboard: {text[:300]}") from None


@contextmanager
def _api_server_variable(address: str) -> Iterator[None]:
    """Sets the address variable, which Ray prefers to RAY_ADDRESS and to its argument."""
    before = os.environ.get(API_SERVER)
    set_variable(API_SERVER, address)
    try:
        yield
    finally:
        set_variable(API_SERVER, before)


def _exit_code(info: JobDetails) -> int:
    if info.status == JobStatus.SUCCEEDED:
        return 0
    code = info.driver_exit_code
    # A negative code is the signal that killed the driver.
    return code if code is not None and code > 0 else LOST_EXIT
