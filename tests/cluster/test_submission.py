"""Handing in by Ray's Jobs API: what is said where the other side is not as it should be.

Against a stand-in that breaks when told to; tests/end_to_end/test_several_nodes.py has a real one.
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
    """As much of Ray's dashboard as submitting needs."""

    def __init__(self, version=ray.__version__):
        self.version, self.jobs, self.logs, self.is_silent = version, {}, {}, False
        self.inputs = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path):
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
            board.inputs.append(self.path)
            if board.is_silent == "closed":
                self.connection.close()
                return
            if board.is_silent:  # a proxy answers in its place
                self.send_error(int(board.is_silent))
                return
            found = board.answer(self.path)
            data = json.dumps(found).encode() if found is not None else b"no such job"
            self.send_response(200 if found is not None else 404)
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


def test_another_version_of_ray_is_refused_with_both_versions(board):
    board.version = "2.9.0"
    with pytest.raises(ConfigError, match=rf"runs Ray 2\.9\.0, this is {ray.__version__}; install"):
        RayJobs(board.address)


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_the_address_that_is_given_wins_over_the_environment(board, monkeypatch, variable):
    """A job must never land on the cluster that happens to be in the environment."""
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    board.jobs["birds--1"] = job("birds--1")
    assert RayJobs(board.address).running(RUN) == ["birds--1"]
    assert os.environ[variable] == "http://127.0.0.1:9"


def test_what_is_no_dashboard_is_said_to_be_none(board):
    board.answer = lambda path: None
    with pytest.raises(ConfigError, match="is no Ray dashboard"):
        RayJobs(board.address)


def test_running_jobs_are_those_of_the_run_and_not_of_its_name(board):
    board.jobs = {
        "birds--1": job("birds--1", "FAILED"),
        "birds--2": job("birds--2", run="s3://other/birds"),
        "birds--3": job("birds--3"),
        "raysubmit_1": {**job("raysubmit_1"), "metadata": None},
    }
    assert RayJobs(board.address).running(RUN) == ["birds--3"]


@pytest.mark.parametrize("silence", ["closed", "502", "429"])
@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ({"status": "SUCCEEDED"}, 0),
        ({"status": "FAILED", "driver_exit_code": 2}, 2),
        ({"status": "FAILED", "driver_exit_code": -9}, LOST_EXIT),
        ({"status": "STOPPED"}, LOST_EXIT),
    ],
)
def test_following_stands_a_connection_that_is_lost_for_a_while(board, ending, code, silence):
    board.jobs["birds--1"] = job("birds--1")
    board.logs["birds--1"] = "one\nhalf"
    lines = []

    def on_line(line):
        lines.append(line)
        if line == "one":
            board.is_silent, silent_since = silence, len(board.inputs)

            def come_back():
                while len(board.inputs) < silent_since + 3:
                    time.sleep(0.01)
                board.jobs["birds--1"] = job("birds--1", **ending)
                board.logs["birds--1"] = "one\nhalf a line\nlast"
                board.is_silent = False

            threading.Thread(target=come_back, daemon=True).start()

    assert RayJobs(board.address).follow("birds--1", on_line=on_line) == code
    assert lines == ["one", "half a line", "last"]


def test_a_cluster_that_stays_away_is_a_named_error(board, monkeypatch):
    monkeypatch.setattr(submission, "PATIENCE_S", 0.1)
    board.jobs["birds--1"] = job("birds--1")
    jobs = RayJobs(board.address)
    board.is_silent = "closed"
    for question in (
        lambda: jobs.follow("birds--1", on_line=print),
        lambda: jobs.state("birds--1"),
        lambda: jobs.running(RUN),
        lambda: jobs.submit("kind: transfer", RUN, "birds"),
    ):
        with pytest.raises(WorkerError, match="gave no answer"):
            question()


def test_a_job_that_nobody_knows_is_said_at_once(board):
    jobs = RayJobs(board.address)
    with pytest.raises(WorkerError, match=r"refused: .*404"):
        jobs.follow("birds--9", on_line=print)
