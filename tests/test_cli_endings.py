"""Whatever ends a command becomes a message and an exit code, on any terminal."""

import io
import json
import re
import signal
import stat
import sys
import tempfile
from pathlib import Path

import pytest
import typer

from dist_tl.cli import app, endings
from dist_tl.cli.endings import exit_code, stop_on_sigterm
from dist_tl.cli.remote import watch
from dist_tl.report.results import JobRecord
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import write_record

RESUMES = "the same command resumes"


@pytest.fixture
def run_verb(monkeypatch):
    """The command line is `dist-tl run`."""
    monkeypatch.setattr(sys, "argv", ["dist-tl", "run", "job.yaml", "store.token=abc"])


@pytest.fixture
def sigterm():
    """SIGTERM stops the command, until the test ends."""
    before = signal.getsignal(signal.SIGTERM)
    stop_on_sigterm()
    yield lambda: signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    endings._received.clear()


def fail():
    raise KeyError("token=abc\nis wrong")


# Unexpected errors.


def test_an_unexpected_error_is_a_message_and_a_private_log_with_its_traceback(
    run_verb, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert exit_code(fail) == endings.FAILED == 3
    err = capsys.readouterr().err
    [log] = tmp_path.iterdir()
    text = log.read_text()
    assert "unexpected KeyError" in err
    assert f"The full traceback is in {log}" in err
    assert RESUMES in err
    assert "Traceback" not in err
    assert "Traceback" in text
    assert "in fail" in text
    assert "dist-tl run job.yaml" in text
    assert "abc" not in err + text
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_without_a_place_for_the_log_the_traceback_is_shown_without_secrets(
    run_verb, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert exit_code(fail) == 3
    err = capsys.readouterr().err
    assert "could not be written" in err
    assert "in fail" in err
    assert "abc" not in err


@pytest.mark.parametrize("words", [["status"], ["report"], ["scale", "generators=2"]])
@pytest.mark.parametrize("content", [b'{"job": {"ki', b"[]", b"{}", b"\xff\xfe", b""])
def test_verbs_on_a_damaged_run_end_with_a_message(command, monkeypatch, tmp_path, words, content):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = tmp_path / "run"
    run.mkdir()
    for name in ("job.json", "results.json"):
        (run / name).write_bytes(content)
    code, _, err = command(words[0], run, *words[1:])
    assert code in (endings.BAD_INPUT, endings.FAILED)
    assert re.search(r"\w+Error: ", err)
    assert "Traceback" not in err


# SIGTERM.


def interrupted_again(sigterm):
    """Ray and typer catch the interrupt and raise another exception."""
    try:
        sigterm()
    except KeyboardInterrupt:
        raise typer.Exit(endings.INTERRUPTED) from None


@pytest.mark.parametrize("end", [lambda sigterm: sigterm(), interrupted_again])
def test_sigterm_stops_like_ctrl_c_with_its_own_code(run_verb, sigterm, capsys, end):
    assert exit_code(lambda: end(sigterm)) == endings.TERMINATED == 143
    assert RESUMES in capsys.readouterr().err


def test_ctrl_c_keeps_its_code(run_verb, sigterm, capsys):
    assert exit_code(lambda: signal.raise_signal(signal.SIGINT)) == endings.INTERRUPTED == 130
    assert RESUMES in capsys.readouterr().err


def test_a_second_sigterm_does_not_interrupt_the_cleaning_up(run_verb, sigterm):
    cleaned = []

    def work():
        try:
            sigterm()
        finally:
            sigterm()
            cleaned.append(True)

    assert exit_code(work) == 143
    assert cleaned == [True]


def test_sigterm_leaves_a_followed_job_running(sigterm, capsys):
    assert exit_code(lambda: watch("runs/a", sigterm)) == 143
    assert "the job keeps running" in capsys.readouterr().err


# Terminals.


@pytest.fixture
def ascii_terminal(monkeypatch, command):
    """Runs the command on a terminal that shows ASCII only; returns exit code and both outputs."""

    def run(*words):
        streams = {
            n: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for n in ("stdout", "stderr")
        }
        for name, stream in streams.items():
            monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, "argv", ["dist-tl", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            app.main()
        for stream in streams.values():
            stream.flush()
        return left.value.code, *(s.buffer.getvalue().decode("ascii") for s in streams.values())

    return run


@pytest.fixture
def tiny(tmp_path):
    """A run in a folder whose name is not ASCII."""
    run = tmp_path / "tïny"
    record = JobRecord(job={"kind": "transfer", "generators": {}}, fingerprint="f", versions={})
    write_record(ObjectStore(run), "job.json", record)
    return run


def test_a_terminal_that_lacks_a_character_shows_a_replacement(ascii_terminal, tiny):
    code, out, _ = ascii_terminal("status", tiny)
    assert code == 0
    assert "t?ny: transfer" in out
    code, _, err = ascii_terminal("report", tiny)
    assert code == endings.BAD_INPUT
    assert "t?ny contains no results.json" in err


def test_json_keeps_every_character_on_any_terminal(ascii_terminal, tiny):
    code, out, _ = ascii_terminal("status", tiny, "--json")
    assert code == 0
    assert Path(json.loads(out)["run"]) == tiny
