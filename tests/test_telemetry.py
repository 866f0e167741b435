"""Redaction of secrets in logs, and metric rows of resumed runs."""

import json
import logging

import pytest

from dist_tl import telemetry
from dist_tl.telemetry import MetricsLog, SilentProgress, configure_logging, redact

SECRET = "hUnter/2+x"


@pytest.mark.parametrize(
    "text",
    [
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f"export AWS_ACCESS_KEY_ID={SECRET}; run",
        f"aws_secret_access_key = {SECRET}",
        f"{{'AWS_SECRET_ACCESS_KEY': '{SECRET}', 'region': 'eu'}}",
        json.dumps({"secretAccessKey": SECRET}),
        json.dumps(json.dumps({"secret": SECRET})),
        f'password: "{SECRET} and a space {SECRET}"',
        f"passwd={SECRET}",
        f"RAY_AUTH_TOKEN={SECRET}",
        f"hf_token={SECRET}",
        f"--token {SECRET}",
        f"--secret-key={SECRET}",
        f"api_key={SECRET}, retry=3",
        f"Authorization: Bearer {SECRET}",
        f"got header bearer {SECRET}==",
        f"AWS4-HMAC-SHA256 Credential={SECRET}, Signature={SECRET}",
        f"https://h/x?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}&y=1",
        f"s3://key:{SECRET}@bucket/run",
        f"cannot reach https://me:{SECRET}@host:9000/a?b=c",
        f"redis://:{SECRET}@host",
        "https://hUnter0123456789abcdef@github.com/x.git",
    ],
)
def test_secrets_are_redacted_in_every_notation(text):
    assert "hUnter" not in redact(text)
    assert "***" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "step 3: loss 0.5, 128 tokens=128 tokenizer: bert",
        "s3://bucket/run-7/shards at http://127.0.0.1:9000/bucket/a@b",
        "expected a mapping of keys, got list; key 'width' is given twice",
        "no secret is kept here, and no password",
    ],
)
def test_other_text_is_not_changed(text):
    assert redact(text) == text


def test_text_around_a_secret_is_not_changed():
    assert redact(f"a=1, token={SECRET}, b=2") == "a=1, token=***, b=2"
    assert redact(f"s3://key:{SECRET}@bucket/run") == "s3://***@bucket/run"


@pytest.fixture
def log_lines(capsys):
    logger = logging.getLogger("dist_tl")
    before = logger.handlers[:], logger.level, logger.propagate
    disabled = {n: logging.getLogger(n).disabled for n in ("dist_tl", "dist_tl.x")}
    logger.handlers.clear()
    for name in disabled:
        logging.getLogger(name).disabled = False
    logging.disable(logging.NOTSET)
    yield lambda: capsys.readouterr().err.splitlines()
    logger.handlers[:], logger.level, logger.propagate = before
    for name, value in disabled.items():
        logging.getLogger(name).disabled = value


def test_log_lines_are_redacted_including_arguments_and_tracebacks(log_lines):
    configure_logging()
    try:
        raise ValueError(f"refused password={SECRET}")
    except ValueError:
        logging.getLogger("dist_tl.x").exception("login %s", f"token={SECRET}")
    text = "\n".join(log_lines())
    assert "ValueError" in text
    assert "hUnter" not in text


def test_configuring_twice_writes_each_line_once(log_lines):
    configure_logging()
    configure_logging(logging.WARNING)
    logging.getLogger("dist_tl.x").info("not shown")
    logging.getLogger("dist_tl.x").warning("shown")
    assert [line.split(": ")[-1] for line in log_lines()] == ["shown"]


def test_silent_progress_prints_nothing(capsys):
    progress = SilentProgress()
    progress.update("task", 1, 2, "note")
    progress.say("line")
    assert capsys.readouterr() == ("", "")


def rows(data):
    return [json.loads(line) for line in data.splitlines()]


def test_every_flush_passes_all_rows_to_the_sink():
    flushed = []
    log = MetricsLog(flushed.append, flush_every_s=1e9)
    log.log(step=1, loss=0.5)
    log.flush()
    log.log(step=2, loss=0.25, note="é")
    log.flush()
    assert [[row["step"] for row in rows(data)] for data in flushed] == [[1], [1, 2]]
    assert rows(flushed[1])[0]["loss"] == 0.5
    assert rows(flushed[1])[1]["note"] == "é"
    assert flushed[1].endswith(b"\n")


def test_a_resumed_log_continues_the_text_of_its_checkpoint():
    flushed = []
    first = MetricsLog(flushed.append)
    for step in range(1, 6):
        first.log(step=step, attempt=0)
    text = first.text()
    first.log(step=6, attempt=0)
    resumed = MetricsLog(flushed.append, existing=text)
    assert resumed.text() == text
    for step in range(6, 9):
        resumed.log(step=step, attempt=1)
    resumed.flush()
    steps = [(row["step"], row["attempt"]) for row in rows(flushed[-1])]
    assert steps == [(s, 0) for s in range(1, 6)] + [(s, 1) for s in range(6, 9)]


def test_rows_are_flushed_periodically(monkeypatch):
    now, flushed = [100.0], []
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: now[0])
    log = MetricsLog(flushed.append, flush_every_s=10)
    for step in range(25):
        now[0] += 1
        log.log(step=step)
    assert [len(rows(data)) for data in flushed] == [10, 20]
