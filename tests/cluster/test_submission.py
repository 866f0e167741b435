"""Submission by Ray's Jobs API: behaviour if the cluster fails or differs.

Uses a stand-in dashboard with scripted failures; tests/end_to_end/test_several_nodes.py uses Ray.
"""

import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray

from dist_tl.cluster import submission
from dist_tl.cluster.submission import LOST_EXIT, RayJobs
from dist_tl.errors import ConfigError, WorkerError

RUN = "s3://bucket/birds"


def job(name, status="RUNNING", run=RUN, **more):
    return {
        "type": "SUBMISSION",
        "submission_id": name,
        "entrypoint": "it",
        "status": status,
        "metadata": {"dist-tl/run": run},
        **more,
    }


class Dashboard:
    """The part of Ray's dashboard that submission needs."""

    def __init__(self, version=ray.__version__):
        self.version, self.jobs, self.logs, self.failure = version, {}, {}, None
        self.requests = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def response(self, path):
        if path == "/api/version":
            return {
                "version": "5",
                "ray_version": self.version,
                "ray_commit": "",
                "session_name": "",
            }
        if path == "/api/jobs/":
            return list(self.jobs.values())
        name, _, part = path.removeprefix("/api/jobs/").partition("/")
        if name not in self.jobs:
            return None
        return {"logs": self.logs.get(name, "")} if part == "logs" else self.jobs[name]


def _handler(board):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            board.requests.append(self.path)
            if board.failure == "closed":
                self.connection.close()
                return
            if board.failure:  # the status code of a proxy
                self.send_error(int(board.failure))
                return
            response = board.response(self.path)
            data = json.dumps(response).encode() if response is not None else b"no such job"
            self.send_response(200 if response is not None else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    return Handler


@pytest.fixture
def board(monkeypatch):
    monkeypatch.setattr(submission, "POLL_S", 0.02)
    dashboard = Dashboard()
    yield dashboard
    dashboard.close()


def test_another_version_of_ray_is_rejected_with_both_versions(board):
    board.version = "2.9.0"
    with pytest.raises(ConfigError, match=rf"runs Ray 2\.9\.0, this is {ray.__version__}; install"):
        RayJobs(board.address)


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_the_given_address_takes_precedence_over_the_environment(board, monkeypatch, variable):
    """A job must never be submitted to the cluster of the environment instead."""
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    board.jobs["birds--1"] = job("birds--1")
    assert RayJobs(board.address).running(RUN) == ["birds--1"]
    assert os.environ[variable] == "http://127.0.0.1:9"


def test_an_address_without_a_dashboard_is_a_named_error(board):
    board.response = lambda path: None
    with pytest.raises(ConfigError, match="is not a Ray dashboard"):
        RayJobs(board.address)


def test_running_jobs_are_selected_by_the_url_of_the_run_and_not_by_its_name(board):
    board.jobs = {
        "birds--1": job("birds--1", "FAILED"),
        "birds--2": job("birds--2", run="s3://other/birds"),
        "birds--3": job("birds--3"),
        "raysubmit_1": {**job("raysubmit_1"), "metadata": None},
    }
    assert RayJobs(board.address).running(RUN) == ["birds--3"]


@pytest.mark.parametrize("failure", ["closed", "502", "429"])
@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ({"status": "SUCCEEDED"}, 0),
        ({"status": "FAILED", "driver_exit_code": 2}, 2),
        ({"status": "FAILED", "driver_exit_code": 0}, LOST_EXIT),
        ({"status": "FAILED", "driver_exit_code": -9}, LOST_EXIT),
        ({"status": "STOPPED"}, LOST_EXIT),
    ],
)
def test_following_survives_a_temporary_loss_of_the_connection(board, ending, code, failure):
    board.jobs["birds--1"] = job("birds--1")
    board.logs["birds--1"] = "one\nhalf"
    lines = []

    def on_line(line):
        lines.append(line)
        if line == "one":
            board.failure, failed_at = failure, len(board.requests)

            def recover():
                while len(board.requests) < failed_at + 3:
                    time.sleep(0.01)
                board.jobs["birds--1"] = job("birds--1", **ending)
                board.logs["birds--1"] = "one\nhalf a line\nlast"
                board.failure = None

            threading.Thread(target=recover, daemon=True).start()

    assert RayJobs(board.address).follow("birds--1", on_line=on_line) == code
    assert lines == ["one", "half a line", "last"]


def test_an_unreachable_cluster_is_a_named_error(board, monkeypatch):
    monkeypatch.setattr(submission, "UNREACHABLE_S", 0.1)
    board.jobs["birds--1"] = job("birds--1")
    jobs = RayJobs(board.address)
    board.failure = "closed"
    for call in (
        lambda: jobs.follow("birds--1", on_line=print),
        lambda: jobs.state("birds--1"),
        lambda: jobs.running(RUN),
        lambda: jobs.submit("kind: transfer", RUN, "birds"),
    ):
        with pytest.raises(WorkerError, match="did not respond"):
            call()


def test_an_unknown_job_is_a_named_error_at_once(board):
    jobs = RayJobs(board.address)
    with pytest.raises(WorkerError, match=r"rejected the request: .*404"):
        jobs.follow("birds--9", on_line=print)
