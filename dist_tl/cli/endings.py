"""What ends a command: a result, a named error, Ctrl-C, SIGTERM, or an error that nobody expected.

Each becomes one message and an exit code. The traceback of an unexpected error goes to a log file.
"""

import io
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import typer

from dist_tl.cli.display import errors
from dist_tl.errors import ConfigError, DataError, DistTLError, SupersededError
from dist_tl.telemetry import redact

BAD_INPUT, FAILED, INTERRUPTED, TERMINATED = 2, 3, 130, 143
RESUME = "stopped; the same command resumes from what is committed"
MESSAGE_CHARACTERS = 500

_received: set[int] = set()


def stop_on_sigterm() -> None:
    """Makes SIGTERM, by which a cluster manager stops a process, stop the command like Ctrl-C."""
    if threading.current_thread() is threading.main_thread():  # Python allows no other to
        _received.clear()
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # `timeout` sends it twice, and the second one must not interrupt the cleaning up.
    if number not in _received:
        # Remembered, because Ray and typer catch the exception and raise another one.
        _received.add(number)
        raise KeyboardInterrupt


def interrupted_code() -> int:
    """Returns the exit code of an interrupted command: 143 after SIGTERM, else 130."""
    return TERMINATED if signal.SIGTERM in _received else INTERRUPTED


def replace_unknown_characters() -> None:
    """Shows "?" for a character that the terminal's encoding lacks, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def exit_code(command: Callable[[], Any]) -> Any:
    """Runs `command` and returns its exit code; prints a message if an error ended it."""
    try:
        code = command() or 0
    except (typer.Exit, SystemExit) as leaving:
        code = getattr(leaving, "exit_code", getattr(leaving, "code", 0))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except typer.TyperException as error:
        # Typer's errors have `show`; their public base class does not declare it.
        error.show()  # pyright: ignore[reportAttributeAccessIssue]
        return BAD_INPUT
    except (ConfigError, DataError) as error:
        _explain(error)
        return BAD_INPUT
    except DistTLError as error:
        _explain(error)
        if not isinstance(error, SupersededError):  # a later attempt is running already
            _say_how_to_resume()
        return FAILED
    except Exception as error:
        _report_unexpected(error)
        _say_how_to_resume()
        return FAILED
    if code != INTERRUPTED:
        return code
    _say_how_to_resume()
    return interrupted_code()


def _say_how_to_resume() -> None:
    # The other verbs start nothing, or only watch.
    if sys.argv[1:2] in (["run"], ["forecast"]):
        errors.print(RESUME)


def _explain(error: DistTLError) -> None:
    _print_red(f"{type(error).__name__}: {redact(str(error))}")


def _report_unexpected(error: Exception) -> None:
    text = " ".join(redact(str(error)).split())[:MESSAGE_CHARACTERS]
    _print_red(f"unexpected {type(error).__name__}: {text}")
    log = f"{redact(shlex.join(sys.argv))}\n{redact(''.join(traceback.format_exception(error)))}"
    try:
        place = _write_log(log)
    except OSError as reason:
        _print_red(f"the log of this error could not be written ({reason}); it follows\n{log}")
        return
    _print_red(
        "a file of the run or of this machine may be damaged or not usable; if none is, report "
        f"this as a defect of dist_tl. The full traceback is in {place}"
    )


def _write_log(text: str) -> str:
    """Writes `text` to a new private file in the temporary folder; returns its path."""
    descriptor, path = tempfile.mkstemp(prefix="dist-tl-", suffix=".log")
    with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
    return path


def _print_red(text: str) -> None:
    errors.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
