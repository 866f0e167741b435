"""Terminal output: tables, progress bars, and plain lines if stderr is not a terminal."""

import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from dist_tl.telemetry import redact

PLAIN_LINE_EVERY_S = 10.0
MAX_BARS = 6

console = Console()
errors = Console(stderr=True)


def show_table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Prints a table; numeric columns are right-aligned."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, name in enumerate(header):
        cells = [row[i] for row in rows if row[i]]
        numeric = bool(cells) and not any(char.isalpha() for cell in cells for char in cell)
        table.add_column(escape(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


class TerminalProgress:
    """Progress bars on a terminal; otherwise a line when a task ends and every few seconds."""

    def __init__(self) -> None:
        self._live = errors.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=errors,
        )
        self._tasks: dict[str, TaskID] = {}
        self._finished: set[str] = set()
        self._printed_at = time.monotonic()
        self._lock = threading.Lock()

    def __enter__(self) -> "TerminalProgress":
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._bars.stop()

    def update(self, task: str, done: int, total: int, note: str = "") -> None:
        with self._lock:
            if self._live:
                self._draw(task, done, total, note)
            else:
                self._print_plain(task, done, total, note)

    def say(self, line: str) -> None:
        errors.print(escape(redact(line)))

    def _draw(self, task: str, done: int, total: int, note: str) -> None:
        if task not in self._tasks:
            self._remove_finished()
            self._tasks[task] = self._bars.add_task(escape(task), total=total, note=note)
        self._bars.update(self._tasks[task], completed=done, total=total, note=note)
        if done >= total:
            self._finished.add(task)

    def _remove_finished(self) -> None:
        for task in [name for name in self._tasks if name in self._finished]:
            if len(self._tasks) < MAX_BARS:
                return
            self._bars.remove_task(self._tasks.pop(task))

    def _print_plain(self, task: str, done: int, total: int, note: str) -> None:
        ended = done >= total and task not in self._finished
        if ended:
            self._finished.add(task)
        if ended or time.monotonic() - self._printed_at > PLAIN_LINE_EVERY_S:
            self._printed_at = time.monotonic()
            print(f"{task}: {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)
