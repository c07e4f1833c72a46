"""Tensors in a file, read when asked, and files of tensors, written one tensor at a time."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import DTypeLike

from llama_jax.errors import InputError


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        shape: its lengths.
        dtype: bfloat16 is `ml_dtypes.bfloat16`.
        read: returns it as a read-only array on a memory map of its bytes alone. Each call creates
            a new map, so the pages leave the memory when the array is garbage-collected. Raises
            InputError if the file has changed since it was opened.
        exact: whether these are the file's own numbers; if not, they are computed from quantized
            blocks, and can't be turned back.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    exact: bool = True

    @property
    def nbytes(self) -> int:
        """Size of the array, in bytes; an expanded tensor takes less in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def quote(name: object) -> str:
    """Returns what a file says as a message can show it: quoted, escaped and not endless."""
    plain = isinstance(name, str | int | float | None)
    text = ascii(name) if plain else f"a {type(name).__name__}"
    return text if len(text) <= 100 else f"{text[:80]}...{text[-17:]}"


def mapped_tensor(
    path: Path,
    name: str,
    dtype: np.dtype,
    start: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
) -> StoredTensor:
    """Returns the tensor whose first element is at byte `start` of the file.

    Args:
        path: the file, whose size and bounds the caller has checked.
        name: the tensor's name, for messages.
        dtype: of its elements, which lie there in little-endian order.
        start: a byte of the file.
        shape: its lengths, each at least 0.
        strides: in elements, each at least 0; None for row-major order.

    Raises:
        InputError: no array can have this shape.
    """
    if len(shape) > 32 or math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 1 << 63:
        raise InputError(f"{path}: {quote(name)} has a shape beyond all bounds: fetch it again")
    if strides is None:
        strides = row_major_strides(shape)
    # Where a length is 1 its stride means nothing, and may be any number.
    strides = tuple(s if n > 1 else 0 for n, s in zip(shape, strides, strict=True))
    return StoredTensor(shape, dtype, partial(_read, path, name, dtype, start, shape, strides))


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides of row-major order, in elements, as PyTorch counts them."""
    return tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))


def element_span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Returns how many elements lie between a tensor's first and last, with both."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def _read(
    path: Path,
    name: str,
    dtype: np.dtype,
    start: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> np.ndarray:
    nbytes = element_span(shape, strides) * dtype.itemsize
    if nbytes == 0:  # no memory map can be empty
        nothing = np.zeros(shape, dtype)
        nothing.flags.writeable = False
        return nothing
    try:
        bytes_ = np.memmap(path, np.uint8, "r", start, (nbytes,))
        return np.ndarray(shape, dtype, bytes_, strides=[s * dtype.itemsize for s in strides])
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: {quote(name)} can't be read ({error}): the file has changed, start again"
        ) from error


class TensorFileWriter(ABC):
    """Writes a file of tensors, one after the other: the memory holds no more than one.

    An error inside the `with` block removes the file.
    """

    def __init__(self, path: str | Path, header: Mapping[str, tuple[tuple[int, ...], DTypeLike]]):
        """Opens `path` for the tensors `{name: (shape, dtype)}`, which come in this order.

        Raises:
            ValueError: the format has no such dtype.
        """
        self.path = Path(path)
        self._header = {name: (tuple(s), np.dtype(d)) for name, (s, d) in header.items()}
        self._left = list(reversed(self._header))
        self._closed = False

    @abstractmethod
    def _put(self, name: str, data: memoryview) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes the next tensor; its elements may lie in any order.

        Raises:
            ValueError: the header names another tensor next, another shape or another dtype.
        """
        if not self._left or name != self._left[-1]:
            due = self._left[-1] if self._left else "the end"
            raise ValueError(f"{name} was written where {due} was due")
        if (array.shape, array.dtype) != self._header[name]:
            shape, dtype = self._header[name]
            raise ValueError(f"{name} is {array.dtype}{array.shape}, not {dtype}{shape}")
        self._put(name, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._left.pop()

    def close(self) -> None:
        """Ends the file.

        Raises:
            ValueError: tensors are missing.
        """
        if self._closed:
            return
        if self._left:
            raise ValueError(f"{self.path} lacks {self._left[-1]}")
        self._close()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            if not self._closed:
                self.path.unlink(missing_ok=True)
            self._close()
