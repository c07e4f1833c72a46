"""The header of a GGUF file: its metadata and its table of tensors.

Time and memory are bounded, whatever the file claims: at most `_MAX_BYTES` are looked at.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.errors import InputError
from llama_jax.runtime.regular_file import open_regular

MAGIC = b"GGUF"
_MAX_BYTES = 32 << 20  # a Llama 3's header has 8 MB, nearly all of it the tokenizer
_MAX_ENTRIES = 1 << 16  # of the metadata, and of the table of tensors
_MAX_STRINGS = 1 << 20  # of an array: a Llama 3 has 280,000 merges
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip


class TensorInfo(NamedTuple):
    """A line of the table of tensors, as the file says it: nothing about it is checked yet."""

    name: str
    shape: tuple[int, ...]  # row-major, so the reverse of the file's
    ggml_type: int
    offset: int  # from where the data begin [bytes]


class GGUFHeader(NamedTuple):
    """What a GGUF file says before its data."""

    metadata: dict[str, Any]
    tensors: list[TensorInfo]
    nbytes: int


def read_header(path: Path, wanted: str | tuple[str, ...]) -> GGUFHeader:
    """Returns the header of a GGUF file, without the metadata whose keys begin otherwise.

    Arrays that are not wanted are skipped: to read all of a Llama 3's takes half a second.

    Raises:
        InputError: it is not a GGUF file, or is damaged or cut short.
    """
    try:
        with open_regular(path) as file:
            size = min(os.fstat(file.fileno()).st_size, _MAX_BYTES)
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
                return _header(path, _Values(data), wanted)
    except (struct.error, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged or cut short ({error}): fetch it again") from error


def _header(path: Path, values: "_Values", wanted: str | tuple[str, ...]) -> GGUFHeader:
    magic, version, n_tensors, n_keys = values.numbers("<4sIQQ")
    if magic != MAGIC or version not in (2, 3):
        raise InputError(
            f"{path} is no GGUF file of version 2 or 3 (little-endian): convert it anew"
        )
    if max(n_tensors, n_keys) > _MAX_ENTRIES:
        raise ValueError(f"it claims {n_tensors} tensors and {n_keys} keys")
    keys, metadata = set[str](), dict[str, Any]()
    for _ in range(n_keys):
        key, (kind,) = values.string(), values.numbers("<I")
        value = values.of(kind, key.startswith(wanted))
        if value is not None:
            metadata[key] = value
        keys.add(key)
    tensors = [_tensor(values) for _ in range(n_tensors)]
    if len(keys) < n_keys or len({tensor.name for tensor in tensors}) < n_tensors:
        raise ValueError("a name occurs twice")
    return GGUFHeader(metadata, tensors, values.at)


def _tensor(values: "_Values") -> TensorInfo:
    name, (dims,) = values.string(), values.numbers("<I")
    if dims > _MAX_DIMS:
        raise ValueError(f"a tensor has {dims} dimensions")
    *shape, ggml_type, offset = values.numbers(f"<{dims}QIQ")
    return TensorInfo(name, tuple(reversed(shape)), ggml_type, offset)


class _Values:
    """Reads the values of a header one after another."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        """Returns the next bytes."""
        part = self.data[self.at : self.at + size]
        if len(part) != size:
            raise ValueError(f"its header goes beyond byte {len(self.data)}")
        self.at += size
        return part

    def numbers(self, form: str) -> tuple[Any, ...]:
        """Returns the next numbers of a `struct` format."""
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def string(self) -> str:
        """Returns the next string."""
        return self.take(*self.numbers("<Q")).decode()

    def of(self, kind: int, wanted: bool) -> Any:
        """Returns the next value, None where it is not wanted."""
        if kind == _STRING:
            value = self.string()
        elif kind == _ARRAY:
            inner, length = self.numbers("<IQ")
            value = self._array(inner, length, wanted)
        else:
            (value,) = self.numbers(_NUMBERS[kind])
        return value if wanted else None

    def _array(self, kind: int, length: int, wanted: bool) -> list[Any] | None:
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind])
            raw = self.take(dtype.itemsize * length)
            return np.frombuffer(raw, dtype).tolist() if wanted else None
        if kind != _STRING or length > _MAX_STRINGS:
            raise ValueError(f"it claims an array of {length} values of the type {kind}")
        if wanted:
            return [self.string() for _ in range(length)]
        for _ in range(length):
            self.take(*self.numbers("<Q"))
        return None
