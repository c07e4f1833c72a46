"""Shows how far the start of a server is, on standard error."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import jax
from rich.progress import BarColumn, TimeElapsedColumn

from llama_jax.runtime.console import TEXT_COLUMN, TaskProgress, print_status

_POLL_SECONDS = 0.5


@contextmanager
def stage(doing: str, done: str) -> Iterator[Callable[[float, str], None]]:
    """Shows one stage of the start: a bar on a terminal, a line every ten seconds elsewhere.

    Elsewhere a line marks its start too. The line at its end, with the time taken, always appears.

    Args:
        doing: 'compiling 12 programs'.
        done: 'compiled 12 programs'.

    Yields:
        A function that shows the progress: the share that is done [0 … 1], and a text.
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
