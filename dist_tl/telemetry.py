"""Logs, metric rows and progress: what a run says about itself while it works.

Not covered: how progress is drawn (that is the command's) and where metric rows are kept (the
caller hands in a sink).
"""

import json
import logging
import re
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

# The name of a secret, however it is written, and what follows it up to the end of the value.
_NAMED = re.compile(
    r"""(?ix)
    ((?: secret | token(?!s|iz) | passw(?:or)?d | access_?key | api_?key | credential
       | authorization | signature(?=\s*=) ) [\w-]* \\?["']? \s*[=:]\s* )
    (?: (?:bearer|basic)\s+ )?
    (?: \\?"[^"]*" | \\?'[^']*' | [^\s"',;&)\]}]+ )"""
)
_OPTION = re.compile(r"(?i)(--[\w-]*(?:secret|token(?!s|iz)|password|key)[\w-]*\s+)[^\s-]\S*")
_BEARER = re.compile(r"(?i)(\bbearer\s+)[\w.~+/-]{8,}=*")
# A password may hold slashes, as AWS secrets do; a port in front of a path is none.
_LOGIN = re.compile(r"(?i)(\b[a-z][a-z0-9+.-]*://)(?:[^/\s:@]*:(?!\d{1,5}/)[^\s@]+|[^/\s:@]{16,})@")


def redact(text: str) -> str:
    """`text` with logins in URLs and values of secret-looking keys replaced by stars."""
    for pattern in (_NAMED, _OPTION, _BEARER):
        text = pattern.sub(r"\1***", text)
    return _LOGIN.sub(r"\1***@", text)


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def configure_logging(level: int = logging.INFO) -> None:
    """Send dist_tl's log lines to standard error, secrets redacted. Safe to call again."""
    logger = logging.getLogger("dist_tl")
    logger.setLevel(level)
    logger.propagate = False
    if not any(isinstance(h.formatter, _RedactingFormatter) for h in logger.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)


class Progress(Protocol):
    """Where long work reports how far it is. Implementations must be safe to call from threads."""

    def update(self, task: str, done: int, total: int, note: str = "") -> None:
        """Say that `done` of `total` units of `task` are finished; `note` is shown beside it."""

    def say(self, line: str) -> None:
        """Show one line that stays."""


class SilentProgress:
    """Progress that is not shown to anybody."""

    def update(self, task: str, done: int, total: int, note: str = "") -> None:
        pass

    def say(self, line: str) -> None:
        pass


class MetricsLog:
    """Rows of numbers as JSON lines, kept whole in memory and handed to a sink now and then.

    Object stores cannot append, so every flush writes the whole text. A resumed stage passes the
    text it finds and the step it resumes from; rows from beyond that step are dropped, because
    they will be made again.
    """

    def __init__(
        self,
        sink: Callable[[bytes], None],
        *,
        existing: bytes = b"",
        resume_step: int = 0,
        flush_every_s: float = 10.0,
    ) -> None:
        rows = [json.loads(line) for line in existing.splitlines() if line.strip()]
        self._lines = [json.dumps(row) for row in rows if row.get("step", 0) <= resume_step]
        self._sink = sink
        self._flush_every_s = flush_every_s
        self._flushed_at = time.monotonic()

    def log(self, **row: Any) -> None:
        """Add one row; numbers stay numbers, a wall-clock `time` in seconds is added."""
        self._lines.append(json.dumps({"time": round(time.time(), 3), **row}))
        if time.monotonic() - self._flushed_at >= self._flush_every_s:
            self.flush()

    def flush(self) -> None:
        """Hand all rows to the sink."""
        self._sink("".join(line + "\n" for line in self._lines).encode())
        self._flushed_at = time.monotonic()
