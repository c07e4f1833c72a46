"""Status lines and progress bars on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from llama_jax.runtime.hosts import is_host_zero

LINE_SECONDS = 10.0  # between two lines where standard error is no terminal
TEXT_COLUMN = TextColumn("{task.description}")  # shows the text of `TaskProgress.update`


def print_status(text: str) -> None:
    """Prints a line on the standard error of host 0."""
    if is_host_zero():
        print(text, file=sys.stderr, flush=True)


class TaskProgress:
    """Shows the progress of a task on the standard error of host 0.

    A terminal gets a bar, which `close` removes. Otherwise `update` prints a line, at most every
    ten seconds.

    Args:
        columns: of the bar on a terminal; `TEXT_COLUMN` is the one for the text.
        total: amount of work, or None if it is unknown.
        text: of the bar before the first update.
        completed: amount of work that is done at the start.
        shown: False shows nothing.
    """

    def __init__(
        self,
        *columns: ProgressColumn,
        total: float | None,
        text: str = "",
        completed: int = 0,
        shown: bool = True,
    ):
        self._shown = shown and is_host_zero()
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if self._shown and console.is_terminal:
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(text, total=total, completed=completed)
            self._bar.start()

    def update(
        self, completed: float, text: str, *, line_details: str = "", line_now: bool = False
    ) -> None:
        """Shows that `completed` of the total is done.

        Args:
            completed: amount of work that is done in all.
            text: for the column `TEXT_COLUMN` of the bar, and for the line.
            line_details: end of the line. A terminal shows the same in other columns.
            line_now: print the line even if the last one is less than ten seconds old.
        """
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=completed, description=text)
        elif self._shown and (line_now or now - self._last_line > LINE_SECONDS):
            self._last_line = now
            print(text + line_details, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar:
            self._bar.stop()
            self._bar = None


@contextmanager
def byte_progress(title: str, total: int | None, shown: bool) -> Iterator[Callable[[int], None]]:
    """Shows the bytes processed, their rate and the time left.

    Args:
        title: first word of the bar and of each line.
        total: bytes in all, or None if they are unknown.
        shown: False shows nothing.

    Yields:
        A function that adds a number of bytes.
    """
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    start, done = time.monotonic(), 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        rate = done / max(1e-9, time.monotonic() - start)
        if total is None:
            details = f"  {decimal(done)}  {decimal(int(rate))}/s"
        else:
            details = f"  {decimal(done)} of {decimal(total)}  {decimal(int(rate))}/s"
            details += f"  {(total - done) / max(1.0, rate):.0f} s left"
        progress.update(done, title, line_details=details)

    with closing(
        TaskProgress(TEXT_COLUMN, *columns, total=total, text=title, shown=shown)
    ) as progress:
        yield advance
