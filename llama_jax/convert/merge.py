"""Merges low-rank pairs into weights: w + scale · a·b; verifies the result weight by weight."""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from llama_jax.checkpoint.lora_pairs import Pair, StoredPairs
from llama_jax.convert.layout import Weight
from llama_jax.errors import InputError

# Elements of a weight that are merged or verified at once: verifying takes several float64 copies.
_AT_ONCE = 1 << 20
_ROUNDED = 1 + 2**-7  # margin of bounds that are computed from exact values, not rounded ones


def pair_of(pairs: StoredPairs | None, weight: Weight) -> Pair | None:
    """Returns the low-rank pair of a weight, or None if it has none."""
    if pairs is None or weight.layer is None or weight.name not in pairs.lora.targets:
        return None
    return pairs.read(weight.name, weight.layer)


def merge_pair(w: np.ndarray, pair: Pair, scale: float) -> np.ndarray:
    """Returns w + scale · a·b [in…, out…] in float32."""
    merged = np.array(w, np.float32, order="C")
    a, b = _matrices(pair)
    rows = merged.reshape(len(a), -1)
    for part in _row_blocks(rows):
        rows[part] += (np.float32(scale) * a[part]) @ b
    return merged


def check_merged(
    weight: Weight,
    written: np.ndarray,
    w: np.ndarray,
    pair: Pair,
    scale: float,
    dtype: np.dtype,
    step: np.ndarray | float = 0.0,
) -> None:
    """Compares a written weight with w + scale · a·b, computed again in float64.

    It may differ by the rounding of R + 3 operations in float32 (Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.1) and of its own type. An int8 weight may also differ by half a
    step.

    Args:
        weight: its name, for messages.
        written: the weight in the output, in our layout; an int8 weight dequantized.
        w: the weight of the base, in our layout.
        pair: its low-rank pair.
        scale: the factor of the pair.
        dtype: to which the merged weight was cast.
        step: of an int8 weight, the scale of each element; 0 for another.

    Raises:
        InputError: an element differs by more.
    """
    a, b = (matrix.astype(np.float64) for matrix in _matrices(pair))
    rows, base = written.reshape(len(a), -1), w.reshape(len(a), -1)
    own = ml_dtypes.finfo(dtype)
    steps = np.broadcast_to(step, written.shape).reshape(rows.shape)
    for part in _row_blocks(rows):
        stored, base64 = rows[part].astype(np.float64), base[part].astype(np.float64)
        exact = base64 + scale * (a[part] @ b)
        terms = np.abs(base64) + abs(scale) * (np.abs(a[part]) @ np.abs(b))
        bound = (len(b) + 3) * 2.0**-24 * terms + float(own.eps) / 2 * _ROUNDED * np.abs(exact)
        bound += _ROUNDED / 2 * steps[part] + float(own.smallest_subnormal)
        overflow = np.isinf(stored) & (np.abs(exact) > float(own.max))
        close = (np.abs(stored - exact) <= bound) | (stored == exact) | overflow
        if not np.all(close | (np.isnan(stored) & np.isnan(exact))):
            raise InputError(
                f"{weight}: the output is not the base's weight with its low-rank pair merged:"
                " convert again"
            )


def _matrices(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Returns a and b as matrices [in, R] and [R, out]."""
    rank = pair.a.shape[-1]
    return pair.a.reshape(-1, rank), pair.b.reshape(rank, -1)


def _row_blocks(rows: np.ndarray) -> Iterator[slice]:
    """Yields slices of rows with about `_AT_ONCE` elements each."""
    height = max(1, _AT_ONCE // rows.shape[1])
    for start in range(0, len(rows), height):
        yield slice(start, start + height)
