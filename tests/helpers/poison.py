"""Batches whose targets are all one rare token: the gradient norm of their steps is a spike."""

from concurrent.futures import Future
from typing import Any

import numpy as np

from llama_jax.data.samples import Samples

_start_step = Samples._start_step


def poison(patch: Any, batches: Any) -> None:
    """Poisons these batches (0 is the first) in all runs.

    Args:
        patch: pytest's MonkeyPatch, or anything with a `setattr(class, name, value)`.
        batches: a container of numbers.
    """

    def start_step(samples, step, rows):
        reads, number = _start_step(samples, step, rows), samples.batch_number(step)
        return {row: _spoil(read) if number in batches else read
                for row, read in reads.items()}  # fmt: skip

    patch.setattr(Samples, "_start_step", start_step)


def _spoil(read: Future[Any]) -> Future[Any]:
    window, spoiled = read.result(), Future[Any]()
    spoiled.set_result(window._replace(targets=np.full_like(window.targets, 319)))
    return spoiled
