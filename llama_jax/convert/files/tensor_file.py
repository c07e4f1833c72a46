"""Tensors in a file, read on demand, and the base class of writers of tensor files."""

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
from llama_jax.runtime.bucket_path import BucketPath
from llama_jax.runtime.storage import AnyPath


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        shape: the shape.
        dtype: the type; bfloat16 is `ml_dtypes.bfloat16`.
        read: returns the array. A tensor that a local file stores as it is becomes a read-only
            memory map of its bytes alone. Each call creates a new map, so the pages leave the
            memory when the array is garbage-collected. Raises InputError if the file has changed
            since it was opened.
        exact: whether `read` returns the numbers stored in the file. False if it computes them from
            quantized blocks: the blocks can't be restored from the numbers.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    exact: bool = True

    @property
    def nbytes(self) -> int:
        """Size of the array [bytes]; a broadcast tensor takes less in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def quote(name: object) -> str:
    """Returns a value from a file for a message: quoted, escaped, at most 100 characters."""
    plain = isinstance(name, str | int | float | None)
    text = ascii(name) if plain else f"a {type(name).__name__}"
    return text if len(text) <= 100 else f"{text[:80]}...{text[-17:]}"


def mapped_tensor(
    path: AnyPath,
    name: str,
    dtype: np.dtype,
    start: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
) -> StoredTensor:
    """Returns the tensor whose first element is at byte `start` of the file.

    Args:
        path: the file; the caller has checked that it contains all bytes of the tensor.
        name: the tensor's name, for messages.
        dtype: type of the elements, which are little-endian.
        start: offset of the first element [bytes].
        shape: the shape, each length at least 0.
        strides: strides in elements, each at least 0; None for row-major order.

    Raises:
        InputError: the shape is larger than NumPy's limits.
    """
    if len(shape) > 32 or math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 1 << 63:
        raise InputError(f"{path}: {quote(name)} has a shape beyond NumPy's limits: fetch it again")
    if strides is None:
        strides = row_major_strides(shape)
    # The stride of a length of 1 has no effect and may be any number.
    strides = tuple(s if n > 1 else 0 for n, s in zip(shape, strides, strict=True))
    return StoredTensor(shape, dtype, partial(_read, path, name, dtype, start, shape, strides))


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides of row-major order in elements, as PyTorch computes them."""
    return tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))


def element_span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Returns the number of elements from a tensor's first to its last in memory, inclusive."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def _read(
    path: AnyPath,
    name: str,
    dtype: np.dtype,
    start: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> np.ndarray:
    nbytes = element_span(shape, strides) * dtype.itemsize
    if nbytes == 0:  # a memory map can't be empty
        empty = np.zeros(shape, dtype)
        empty.flags.writeable = False
        return empty
    try:
        if isinstance(path, BucketPath):
            with path.open() as file:
                file.seek(start)
                bytes_ = np.frombuffer(file.read(nbytes), np.uint8)
        else:
            bytes_ = np.memmap(path, np.uint8, "r", start, (nbytes,))
        return np.ndarray(shape, dtype, bytes_, strides=[s * dtype.itemsize for s in strides])
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: {quote(name)} can't be read ({error}): the file has changed, start again"
        ) from error


class TensorFileWriter(ABC):
    """Writes a file of tensors one at a time; an error inside the `with` block removes the file."""

    def __init__(self, path: Path, header: Mapping[str, tuple[tuple[int, ...], DTypeLike]]):
        """Opens `path` for the tensors `{name: (shape, dtype)}`, to be written in this order.

        Raises:
            ValueError: the format doesn't have the dtype.
        """
        self.path = path
        self._header = {name: (tuple(s), np.dtype(d)) for name, (s, d) in header.items()}
        self._remaining = list(reversed(self._header))  # names, the next one last
        self._closed = False

    @abstractmethod
    def _write_data(self, name: str, data: memoryview) -> None:
        """Writes the bytes of a tensor."""

    @abstractmethod
    def _close(self) -> None:
        """Completes and closes the file; may be called twice."""

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes the next tensor, in row-major order whatever the strides of `array`.

        Raises:
            ValueError: it is not the header's next tensor, or of another shape or dtype.
        """
        if not self._remaining or name != self._remaining[-1]:
            expected = self._remaining[-1] if self._remaining else "the end"
            raise ValueError(f"{name} was written, but the header's next is {expected}")
        if (array.shape, array.dtype) != self._header[name]:
            shape, dtype = self._header[name]
            raise ValueError(f"{name} is {array.dtype}{array.shape}, not {dtype}{shape}")
        self._write_data(name, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._remaining.pop()

    def close(self) -> None:
        """Completes the file.

        Raises:
            ValueError: tensors of the header are missing.
        """
        if self._closed:
            return
        if self._remaining:
            raise ValueError(f"{self.path} lacks {self._remaining[-1]}")
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
