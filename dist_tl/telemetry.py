"""Logs, metrics and progress of a run.

Not covered: displaying progress (the command line) and storing metrics (the caller passes a sink).
"""

import json
import logging
import re
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

# The name of a secret in any notation, and its value.
_NAMED = re.compile(
    r"""(?ix)
    ((?: secret | token(?!s|iz) | passw(?:or)?d | access_?key | api_?key | credential
       | authorization | signature(?=\s*=) ) [\w-]* \\?["']? \s*[=:]\s* )
    (?: (?:bearer|basic)\s+ )?
    (?: \\?"[^"]*" | \\?'[^']*' | [^\s"',;&)\]}]+ )"""
)
_OPTION = re.compile(r"(?i)(--[\w-]*(?:secret|token(?!s|iz)|password|key)[\w-]*\s+)[^\s-]\S*")
_BEARER = re.compile(r"(?i)(\bbearer\s+)[\w.~+/-]{8,}=*")
# A password may contain slashes, as AWS secrets do; a port before a path is not a password.
_LOGIN = re.compile(r"(?i)(\b[a-z][a-z0-9+.-]*://)(?:[^/\s:@]*:(?!\d{1,5}/)[^\s@]+|[^/\s:@]{16,})@")


def redact(text: str) -> str:
    """Returns `text` with logins in URLs and values of secret-looking keys replaced by stars."""
    for pattern in (_NAMED, _OPTION, _BEARER):
        text = pattern.sub(r"\1***", text)
    return _LOGIN.sub(r"\1***@", text)


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def configure_logging(level: int = logging.INFO) -> None:
    """Sends dist_tl's log lines to standard error with secrets redacted. Safe to call again."""
    logger = logging.getLogger("dist_tl")
    logger.setLevel(level)
    logger.propagate = False
    if not any(isinstance(h.formatter, _RedactingFormatter) for h in logger.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)


class Progress(Protocol):
    """Reports the progress of long work. Implementations must be thread-safe."""

    def update(self, task: str, done: int, total: int, note: str = "") -> None:
        """Reports that `done` of `total` units of `task` are finished; `note` is shown with it."""

    def say(self, line: str) -> None:
        """Shows a permanent line."""


class SilentProgress:
    """Progress that is not displayed."""

    def update(self, task: str, done: int, total: int, note: str = "") -> None:
        pass

    def say(self, line: str) -> None:
        pass


class MetricsLog:
    """Metric rows as JSON lines, kept in memory and passed to a sink periodically.

    Object stores cannot append, so every flush writes the whole text. A resumed stage passes the
    text of its checkpoint.
    """

    def __init__(
        self,
        sink: Callable[[bytes], None],
        *,
        existing: bytes = b"",
        flush_every_s: float = 10.0,
    ) -> None:
        self._lines = existing.decode().splitlines()
        self._sink = sink
        self._flush_every_s = flush_every_s
        self._flushed_at = time.monotonic()

    def log(self, **row: Any) -> None:
        """Adds one row and a wall-clock `time` in seconds."""
        self._lines.append(json.dumps({"time": round(time.time(), 3), **row}))
        if time.monotonic() - self._flushed_at >= self._flush_every_s:
            self.flush()

    def flush(self) -> None:
        """Passes all rows to the sink."""
        self._sink(self.text())
        self._flushed_at = time.monotonic()

    def text(self) -> bytes:
        """Returns all rows as JSON lines."""
        return "".join(line + "\n" for line in self._lines).encode()
