"""Shows how far the start of a server is, on standard error."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

_LINE_SECONDS = 10  # between two lines where standard error is no terminal
_POLL_SECONDS = 0.5


@contextmanager
def stage(doing: str, done: str) -> Iterator[Callable[[float, str], None]]:
    """Shows one stage of the start: a bar on a terminal, a line every ten seconds elsewhere.

    A line at its start and one at its end appear in any case; the last one has the time it took.

    Args:
        doing: 'compiling 12 programs'.
        done: 'compiled 12 programs'.

    Yields:
        What tells the progress: the share that is done [0 … 1], and a text.
    """
    console = Console(stderr=True)
    begun, verb = time.monotonic(), doing.partition(" ")[0]
    if console.is_terminal:
        columns = (BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(doing, total=1.0)
            yield lambda share, text: bar.update(
                task, completed=share, description=f"{verb} {text}"
            )
    else:
        _tell(f"{doing} …")
        yield _lines(verb)
    _tell(f"{done} in {time.monotonic() - begun:.1f} s")


def _lines(verb: str) -> Callable[[float, str], None]:
    begun = told = time.monotonic()

    def advance(share: float, text: str) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told > _LINE_SECONDS:
            told = now
            _tell(f"{verb} {text}  {now - begun:.0f} s")

    return advance


@contextmanager
def loading(n_bytes: int) -> Iterator[None]:
    """Shows how much of a model is loaded, as its arrays appear on the devices.

    Args:
        n_bytes: size of its weights.
    """
    gigabytes = f"{n_bytes / 1e9:.2f} GB"
    with stage(f"loading {gigabytes} of weights", f"loaded {gigabytes} of weights") as show:
        before, ended = _bytes_on_devices(), threading.Event()

        def watch() -> None:
            loaded = 0
            while not ended.wait(_POLL_SECONDS):
                # Layers are copied apart at the end: what has been loaded never falls.
                loaded = max(loaded, min(n_bytes, _bytes_on_devices() - before))
                show(loaded / n_bytes, f"weights: {loaded / 1e9:.2f} of {gigabytes}")

        watcher = threading.Thread(target=watch, name="loading", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def _bytes_on_devices() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
