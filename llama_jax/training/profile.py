"""Profiles some steps of a run with `jax.profiler`."""

import contextlib
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from llama_jax.runtime.bucket_path import BucketPath
from llama_jax.runtime.console import print_status
from llama_jax.runtime.storage import AnyPath, remove_tree, write_many

FOLDER = "profile"
REQUESTED_STEPS = 3  # that a SIGUSR1 profiles


class Profiler:
    """Writes a trace of the steps `steps` into the run folder, and one for each SIGUSR1.

    Each host profiles itself: the files have its name. A step is complete on its devices before the
    trace ends.

    Args:
        folder: of the run.
        steps: first and last step (1 is the first); None: only on request.
    """

    def __init__(self, folder: AnyPath, steps: tuple[int, int] | None):
        self._folder, self._steps = folder, steps
        self._last, self._directory = 0, Path()  # of the trace that runs; 0: none does
        self._requested = False

    @contextlib.contextmanager
    def on_request(self) -> Iterator[None]:
        """Lets SIGUSR1 request a trace of the next `REQUESTED_STEPS` steps in the block."""

        def request(*_: Any) -> None:
            self._requested = True

        handler = signal.signal(signal.SIGUSR1, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR1, handler)
            self._stop()

    def before_step(self, step: int) -> None:
        """Starts a trace before `step` is dispatched, if one is due."""
        if self._last:
            return
        if self._steps and step == self._steps[0]:
            self._last = self._steps[1]
        elif self._requested:
            self._last, self._requested = step + REQUESTED_STEPS - 1, False
        else:
            return
        folder = self._folder / FOLDER
        self._directory = folder if isinstance(folder, Path) else Path(tempfile.mkdtemp())
        jax.profiler.start_trace(self._directory)

    def after_step(self, step: int, metrics: Any) -> None:
        """Ends the trace after its last step has been dispatched and has given its metrics."""
        if step == self._last:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        if not self._last:
            return
        self._last = 0
        jax.profiler.stop_trace()
        if isinstance(self._folder, BucketPath):
            paths = [path for path in self._directory.rglob("*") if path.is_file()]
            names = {path: path.relative_to(self._directory).as_posix() for path in paths}
            write_many(self._folder / FOLDER, {names[p]: p.read_bytes() for p in paths})
            remove_tree(self._directory)
        print_status(f"the profile is in {self._folder / FOLDER}")
