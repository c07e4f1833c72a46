"""Status lines and progress bars on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from llama_jax.runtime.hosts import leads


def tell(text: str) -> None:
    """Prints a line for people, on the standard error of host 0."""
    if leads():
        print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Returns '3d04h', '2h05m', '4m09s' or '12s'."""
    s = round(seconds)
    if s >= 86_400:
        return f"{s // 86_400}d{s % 86_400 // 3600:02d}h"
    if s >= 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"


@contextmanager
def byte_progress(title: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Shows bytes, rate and time left on standard error; calling what it gives adds bytes.

    A bar on a terminal, a line every ten seconds elsewhere.
    """
    console = Console(stderr=True)
    if shown and not console.is_terminal:
        yield _lines(title, total)
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn(title), *columns, console=console, disable=not shown, transient=True
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda n: bar.advance(task, n)


def _lines(title: str, total: int) -> Callable[[int], None]:
    begun = told = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, told
        done += n
        now = time.monotonic()
        if now - told > 10:
            told, rate = now, done / (now - begun)
            print(
                f"{title}  {done / 1e9:.1f} of {total / 1e9:.1f} GB  {rate / 1e6:.0f} MB/s"
                f"  {(total - done) / rate:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    return advance
