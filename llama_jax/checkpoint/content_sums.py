"""Content sums: 64 bits for each stored array, which change when its chunks are exchanged.

The checksum in a chunk detects every change of its bytes, but not that another intact chunk is in
its place. A content sum adds the 64-bit words of each chunk, times a factor that depends on the
position of the chunk, modulo 2⁶⁴. It is computed on the host from blocks of any shape, at about the
speed of memory, and needs no device.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

_WORD = 8  # bytes
_MODULUS = 1 << 64


def block_sum(values: np.ndarray, origin: Sequence[int], chunk: Sequence[int]) -> int:
    """Returns the partial content sum of one block of an array.

    Args:
        values: the elements, of 1, 2 or 4 bytes each.
        origin: position of the first one in the array.
        chunk: shape of the array's chunks.
    """
    if not values.shape:
        values, origin, chunk = values.reshape(1), (0,), (1,)
    total = 0
    for start, part in chunk_parts(values, origin, chunk):
        position = [a // size for a, size in zip(start, chunk, strict=True)]
        total += _sum_words(part, start[-1]) * _factor(position)
    return total % _MODULUS


def chunk_parts(
    values: np.ndarray, origin: Sequence[int], chunk: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Yields the part of a block in each chunk, after its position in the array.

    The arguments are those of `block_sum`.
    """
    edges = [
        [start, *range((start // size + 1) * size, start + n, size), start + n]
        for start, n, size in zip(origin, values.shape, chunk, strict=True)
    ]
    for piece in itertools.product(*map(itertools.pairwise, edges)):
        ranges = (slice(a - start, b - start) for (a, b), start in zip(piece, origin, strict=True))
        yield tuple(a for a, _ in piece), values[tuple(ranges)]


def _sum_words(values: np.ndarray, first: int) -> int:
    """Returns the sum modulo 2⁶⁴ of the words along the last dimension, which starts at `first`."""
    per_word = _WORD // values.dtype.itemsize
    values = values.view(f"u{values.dtype.itemsize}")
    before, after = first % per_word, -(first + values.shape[-1]) % per_word
    if before or after:  # a word is divided between two blocks
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(before, after)])
    if values.strides[-1] != values.itemsize:
        values = np.ascontiguousarray(values)
    return int(np.add.reduce(values.view(np.uint64), axis=None))


def _factor(position: Sequence[int]) -> int:
    digest = hashlib.sha256(repr([*position]).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def stored_sum(store: Any, blocks: Iterable[tuple[Sequence[int], np.ndarray]]) -> int:
    """Returns the partial content sum of blocks of a stored array, given with their origins."""
    chunk = stored_chunk(store)
    return sum(block_sum(values, origin, chunk) for origin, values in blocks) % _MODULUS


def stored_chunk(store: Any) -> tuple[int, ...]:
    """Returns the shape of a stored array's chunks."""
    return store.chunk_layout.write_chunk.shape or ()  # None for a scalar


def complete_sums(parts: Iterable[Mapping[str, int]]) -> dict[str, str]:
    """Returns content sums from partial ones, in 16 hexadecimal digits each."""
    total = Counter[str]()
    for part in parts:
        total.update(part)
    return {name: f"{value % _MODULUS:016x}" for name, value in total.items()}
