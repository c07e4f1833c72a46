"""The samples of a run, and the reading of those that its next steps need.

A sample is a window at a fixed position of the token stream of its source. The seed and the number
of the sample alone determine the window. This module doesn't import JAX.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from llama_jax.config.data import DataConfig
from llama_jax.data.epoch_order import find_windows
from llama_jax.data.mixture import Draw, open_schedule
from llama_jax.data.shards import TokenStream
from llama_jax.data.windows import Batch, open_windows
from llama_jax.errors import InputError

AHEAD = 4  # batches that are being read: from this step's to the third after it
READERS = 64  # rows that are read at the same time; a bucket takes 50 ms for each


class Location(NamedTuple):
    """Where a sample is."""

    tokens: TokenStream
    epoch: int  # of its source, from 0
    window: int  # index in its source
    windows: int  # of its source


class Samples:
    """The training samples of a run.

    Args:
        config: the data.
        steps: of the run; no later batch is read ahead. Default: no limit.

    Attributes:
        streams: the training tokens of each source.
        schedule: which source each sample comes from.
        left_out: ranges (first, stop) of batches that no step has, ascending and disjoint.

    Raises:
        InputError: a folder contains no token shards, or fewer tokens than a window.
    """

    def __init__(self, config: DataConfig, steps: int | None = None):
        self.config = config
        self.steps = sys.maxsize if steps is None else steps
        self.streams = [TokenStream(folder, "train") for folder in config.folders]
        self._windows = [open_windows(tokens, config) for tokens in self.streams]
        self._counts = [len(windows) for windows in self._windows]
        for tokens, count in zip(self.streams, self._counts, strict=True):
            if not count:
                raise InputError(
                    f"{tokens.folder} contains {len(tokens):,} training tokens, fewer than one"
                    f" window of data.seq_len + 1 = {config.seq_len + 1:,}: add text or"
                    " shorten seq_len"
                )
        self.schedule = open_schedule(config)
        self._readers = ThreadPoolExecutor(READERS, "read")
        self._ahead = dict[int, dict[int, Future[Batch]]]()  # by step and row
        self.left_out: list[tuple[int, int]] = []

    def read_step(self, step: int, rows: Sequence[int]) -> dict[int, Future[Batch]]:
        """Starts to read rows of the batches of a step and the next ones; returns those of `step`.

        Args:
            step: 0 is the first.
            rows: of each batch, the same in each call.
        """
        for later in range(step, max(step + 1, min(step + AHEAD, self.steps))):
            if later not in self._ahead:
                self._ahead[later] = self._start_step(later, rows)
        started = self._ahead.pop(step)
        self._ahead = {s: reads for s, reads in self._ahead.items() if s > step}
        return started

    def leave_out(self, first: int, stop: int) -> None:
        """Leaves out the batches from `first` to `stop` - 1 (0 is the first) in all steps."""
        merged = list[tuple[int, int]]()
        for start, end in sorted([*self.left_out, (first, stop)]):
            if merged and start <= merged[-1][1]:
                start, end = merged[-1][0], max(end, merged.pop()[1])
            merged.append((start, end))
        self.left_out = merged
        self._ahead = {}

    def batch_number(self, step: int) -> int:
        """Returns which batch a step has (0 is the first of each): the next one not left out."""
        number = step
        for first, stop in self.left_out:
            number += stop - first if number >= first else 0
        return number

    def batches_until(self, steps: int) -> int:
        """Returns the number of batches that the first `steps` steps have or leave out."""
        return self.batch_number(steps - 1) + 1 if steps else 0

    def _start_step(self, step: int, rows: Sequence[int]) -> dict[int, Future[Batch]]:
        B = self.config.batch_size
        draws = self.schedule.draw(self.batch_number(step) * B, B)
        draws = [draws[row] for row in rows]
        reads = zip(rows, draws, locate_windows(draws, self._counts, self.config.seed), strict=True)
        return {
            row: self._readers.submit(self._windows[draw.source].__getitem__, window)
            for row, draw, window in reads
        }

    def folders(self, step: int) -> list[str]:
        """Returns the source of each row of the batch of a step (0 is the first)."""
        names, B = self.schedule.names, self.config.batch_size
        draws = self.schedule.draw(self.batch_number(step) * B, B)
        return [names[draw.source] for draw in draws]

    def __getitem__(self, number: int) -> Batch:
        """Returns sample `number` of the run, a Batch of int32 arrays [T]."""
        [draw] = self.schedule.draw(number, 1)
        [window] = locate_windows([draw], self._counts, self.config.seed)
        return self._windows[draw.source][window]

    def locate(self, number: int) -> Location:
        """Returns where sample `number` of the run is."""
        [draw] = self.schedule.draw(number, 1)
        [window] = locate_windows([draw], self._counts, self.config.seed)
        windows = self._counts[draw.source]
        return Location(self.streams[draw.source], draw.number // windows, window, windows)


def locate_windows(draws: Sequence[Draw], counts: Sequence[int], seed: int) -> list[int]:
    """Returns the index of the window of each draw in its source.

    Args:
        draws: origins of samples.
        counts: windows of each source.
        seed: of the run.
    """
    origins = np.array(draws, np.int64).reshape(-1, 2)
    windows = np.empty(len(draws), np.int64)
    for source in np.unique(origins[:, 0]).tolist():
        of_source = origins[:, 0] == source
        # With the same seed, sources of equal length would be read in the same order.
        windows[of_source] = find_windows(origins[of_source, 1], counts[source], seed + source)
    return windows.tolist()
