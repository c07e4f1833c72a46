"""Shows the progress of a server's start: loading the weights, compiling the programs."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import jax
from rich.progress import BarColumn, TimeElapsedColumn

from llama_jax.runtime.console import TEXT_COLUMN, TaskProgress, print_status

_POLL_SECONDS = 0.5


@contextmanager
def stage_progress(doing: str, done: str) -> Iterator[Callable[[float, str], None]]:
    """Shows one stage of the start: a bar on a terminal, otherwise a line every ten seconds.

    Without a terminal, a line marks the start of the stage too. The line at its end, with the
    elapsed time, always appears.

    Args:
        doing: text while the stage runs, such as 'compiling 12 programs'.
        done: text at its end, such as 'compiled 12 programs'.

    Yields:
        A function that shows the share that is done [0 … 1], and a text.
    """
    start, verb = time.monotonic(), doing.partition(" ")[0]
    columns = (BarColumn(bar_width=20), TimeElapsedColumn(), TEXT_COLUMN)
    with closing(TaskProgress(*columns, total=1.0)) as progress:

        def show(share: float, text: str) -> None:
            elapsed = f"  {time.monotonic() - start:.0f} s"
            progress.update(share, f"{verb} {text}", line_details=elapsed)

        progress.update(0.0, f"{doing} …", line_now=True)
        yield show
    print_status(f"{done} in {time.monotonic() - start:.1f} s")


@contextmanager
def loading_progress(n_bytes: int) -> Iterator[None]:
    """Shows the loaded bytes of a model's weights, measured by the arrays on the devices.

    Args:
        n_bytes: size of the weights.
    """
    size = f"{n_bytes / 1e9:.2f} GB"
    with stage_progress(f"loading {size} of weights", f"loaded {size} of weights") as show:
        n_before, finished = _bytes_on_devices(), threading.Event()

        def watch() -> None:
            n_loaded = 0
            while not finished.wait(_POLL_SECONDS):
                # Unstacking the layers copies and deletes arrays at the end: the count must not
                # decrease.
                n_loaded = max(n_loaded, min(n_bytes, _bytes_on_devices() - n_before))
                show(n_loaded / n_bytes, f"weights: {n_loaded / 1e9:.2f} of {size}")

        watcher = threading.Thread(target=watch, name="loading", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            finished.set()
            watcher.join()


def _bytes_on_devices() -> int:
    return sum(array.nbytes for array in jax.live_arrays())
