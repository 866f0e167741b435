"""Jobs handed to a Ray cluster that runs already, by its Jobs API.

What travels is the resolved job file, as the only file of the working directory; the package is in
the cluster's image. The token of Ray's authentication is taken from the environment by Ray itself.
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
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from dist_tl.cluster.session import answers, set_variable
from dist_tl.errors import ConfigError, WorkerError
from dist_tl.telemetry import redact

POLL_S = 1.0
API_SERVER = "RAY_API_SERVER_ADDRESS"
PATIENCE_S = 120.0  # how long a cluster that runs a job may be out of reach
RUN = "dist-tl/run"  # two runs may share a last part: only this says which one a job is of
JOB_FILE = "job.yaml"
ENTRYPOINT = f"python -m dist_tl run {JOB_FILE}"
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
Answer = TypeVar("Answer")
_NOT_NOW = re.compile(r"status code (429|5\d\d)")  # of a proxy, or while the dashboard starts
LOST_EXIT = 3  # of a job that ended without an exit code: it can be started again


class _OutOfReach(WorkerError):
    """Nobody answered; somebody may in a moment."""


class RayJobs:
    """The Jobs API of one cluster.

    Args:
        address: e.g. http://127.0.0.1:8265, the cluster's dashboard.

    Raises:
        ConfigError: nobody answers there, the token is wrong, or its Ray is another version.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        parts, port = _parsed(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"--address: expected the URL of Ray's dashboard, e.g. http://127.0.0.1:8265, got "
                f"{redact(address)!r}"
            )
        if parts.username is not None or parts.password is not None:
            raise ConfigError(
                "--address: expected a URL without a login, which is kept with the run; Ray's own "
                "token goes into RAY_AUTH_TOKEN or a file that RAY_AUTH_TOKEN_PATH names"
            )
        if not answers(parts.hostname, port or (443 if parts.scheme == "https" else 80)):
            raise ConfigError(
                f"nobody answers at {redact(address)}; is the cluster up, and its dashboard in "
                "reach (kubectl port-forward service/...-head-svc 8265)?"
            )
        logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
        self._client = _connected(address)
        self._check_version()

    def _check_version(self) -> None:
        answer = self._ask(lambda: self._client._do_request("GET", "/api/version").json())
        theirs = answer.get("ray_version", "")
        if theirs.split(".")[:2] != ray.__version__.split(".")[:2]:
            raise ConfigError(
                f"the cluster at {self.address} runs Ray {theirs}, this is {ray.__version__}; "
                "install the same version on both sides"
            )

    def running(self, run: str) -> list[str]:
        """Submissions of the run at a URL that have not ended, by id.

        Raises:
            WorkerError: the cluster is gone.
        """
        return [
            job.submission_id
            for job in self._ask(self._client.list_jobs)
            if job.submission_id is not None
            and (job.metadata or {}).get(RUN) == run
            and job.status not in ENDED
        ]

    def submit(self, job_text: str, run: str, label: str) -> str:
        """Hand in a job; returns its id, the label with a number of its own.

        Args:
            job_text: the job file.
            run: URL of its run.
            label: a name for people, from the last part of the URL.

        Raises:
            WorkerError: the cluster refused, or is gone.
        """
        taken = {job.submission_id for job in self._ask(self._client.list_jobs)}
        number = next(n for n in itertools.count(1) if f"{label}--{n}" not in taken)
        with tempfile.TemporaryDirectory(prefix="dist_tl-submit-") as folder:
            (Path(folder) / JOB_FILE).write_text(job_text)
            try:
                return self._ask(
                    lambda: self._client.submit_job(
                        entrypoint=ENTRYPOINT,
                        submission_id=f"{label}--{number}",
                        runtime_env={"working_dir": folder},
                        metadata={RUN: run},
                    )
                )
            except ValueError as error:
                raise WorkerError(f"the cluster refused the job: {redact(str(error))}") from None

    def follow(self, name: str, *, on_line: Callable[[str], None]) -> int:
        """Show the job's log until it ends; returns its exit code.

        Raises:
            WorkerError: the cluster does not know the job, or stays away.
        """
        shown = 0
        while True:
            about = self._ask_patiently(lambda: self._client.get_job_info(name))
            try:
                log = self._ask_patiently(lambda: self._client.get_job_logs(name))
            except WorkerError:
                if about.status not in ENDED:
                    raise
                return _exit_code(about)  # it ended; that its log is gone changes nothing
            # The last line may still be written to.
            lines = log.splitlines()
            whole = len(lines) if about.status in ENDED or log.endswith("\n") else len(lines) - 1
            for line in lines[shown:whole]:
                on_line(line)
            shown = max(shown, whole)
            if about.status in ENDED:
                return _exit_code(about)
            time.sleep(POLL_S)

    def state(self, name: str) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED, with the reason where there is one.

        Raises:
            WorkerError: the cluster does not know the job, or is gone.
        """
        about = self._ask(lambda: self._client.get_job_info(name))
        message = f": {about.message}" if about.message and about.status == "FAILED" else ""
        return f"{about.status.value}{message}"

    def log(self, name: str) -> str:
        """What the job has printed so far.

        Raises:
            WorkerError: the cluster does not know the job, or is gone.
        """
        return self._ask(lambda: self._client.get_job_logs(name))

    def stop(self, name: str) -> None:
        """End the job; returns when it has ended.

        Raises:
            WorkerError: the cluster does not know the job, or is gone.
        """
        while self._ask_patiently(lambda: self._client.get_job_status(name)) not in ENDED:
            self._ask_patiently(lambda: self._client.stop_job(name))  # one that just starts is deaf
            time.sleep(POLL_S)

    def _ask_patiently(self, question: Callable[[], Answer]) -> Answer:
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self._ask(question)
            except _OutOfReach:
                if time.monotonic() > until:
                    raise
                time.sleep(POLL_S)

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        try:
            return question()
        except OSError as error:  # those of the HTTP library are
            raise _OutOfReach(
                f"the cluster at {self.address} gave no answer: {redact(str(error))[:300]}"
            ) from None
        except (RuntimeError, ray.exceptions.RayError) as error:
            if _NOT_NOW.search(str(error)):
                raise _OutOfReach(
                    f"the cluster at {self.address}: {redact(str(error))[:300]}"
                ) from None
            raise WorkerError(
                f"the cluster at {self.address} refused: {redact(str(error))[:300]}"
            ) from None


def _parsed(address: str) -> tuple[SplitResult, int | None]:
    try:
        parts = urlsplit(address)
        return parts, parts.port
    except ValueError as error:
        raise ConfigError(f"--address: {redact(address)!r} is no URL: {error}") from None


def _connected(address: str) -> JobSubmissionClient:
    try:
        with _alone_in_the_environment(address):
            return JobSubmissionClient(address)
    except Exception as error:  # Ray raises whatever its transport raised
        text = redact(str(error))
        if any(word in text.lower() for word in ("auth", "token", "401", "403")):
            raise ConfigError(
                f"the cluster at {redact(address)} refused the token; set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's own"
            ) from None
        raise ConfigError(f"{redact(address)} is no Ray dashboard: {text[:300]}") from None


@contextmanager
def _alone_in_the_environment(address: str) -> Iterator[None]:
    """Ray lets this variable, and else RAY_ADDRESS, win over the address it is given."""
    before = os.environ.get(API_SERVER)
    set_variable(API_SERVER, address)
    try:
        yield
    finally:
        set_variable(API_SERVER, before)


def _exit_code(about: Any) -> int:
    if about.status == JobStatus.SUCCEEDED:
        return 0
    code = about.driver_exit_code
    # A negative code is the signal that killed the driver.
    return code if code is not None and code > 0 else LOST_EXIT
