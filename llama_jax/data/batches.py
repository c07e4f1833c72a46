"""Batches as a pure function of the step."""
from typing import NamedTuple
import jax
import numpy as np
class Batch(NamedTuple):
    """Rows of tokens and what is to be predicted; each [B, T], with a leading A for micro-batches."""

    tokens: np.ndarray | jax.Array  # int32
    targets: np.ndarray | jax.Array  # int32: the next token, or -1 where no loss is taken
    positions: np.ndarray | jax.Array  # int32: position in its document, as far as the window shows
    segments: np.ndarray | jax.Array  # int32: number of its document in the window, from 1
