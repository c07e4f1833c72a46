"""Reads the header of a GGUF file: its metadata and its table of tensors.

Time and memory are bounded for any content: the reader parses at most `_MAX_BYTES`.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import os
import struct
from typing import Any, NamedTuple

import numpy as np

from llama_jax.errors import InputError
from llama_jax.runtime.bucket_path import BucketPath
from llama_jax.runtime.storage import AnyPath, open_file

MAGIC = b"GGUF"
_MAX_BYTES = 32 << 20  # the header of a Llama 3 has 8 MB, mostly its tokenizer
_MAX_ENTRIES = 1 << 16  # in the metadata, and in the table of tensors
_MAX_STRINGS = 1 << 20  # in an array; a Llama 3 has 280,000 merges
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip


class TensorInfo(NamedTuple):
    """An entry of the table of tensors, as the file states it: not checked."""

    name: str
    shape: tuple[int, ...]  # row-major: the reverse of the order in the file
    ggml_type: int
    offset: int  # from the start of the data section [bytes]


class GGUFHeader(NamedTuple):
    """The metadata and the table of tensors of a GGUF file."""

    metadata: dict[str, Any]
    tensors: list[TensorInfo]
    nbytes: int  # size of the header


def read_header(path: AnyPath, wanted: str | tuple[str, ...]) -> GGUFHeader:
    """Returns the header of a GGUF file.

    Args:
        path: the file.
        wanted: prefixes of the metadata keys to return. The other arrays are skipped: reading all
            arrays of a Llama 3 takes half a second.

    Raises:
        InputError: the file is not a GGUF file, or is damaged or truncated.
    """
    try:
        with open_file(path) as file:
            if isinstance(path, BucketPath):  # one request instead of one for each value
                return _parse_header(path, _ValueReader(file.read(_MAX_BYTES)), wanted)
            size = min(os.fstat(file.fileno()).st_size, _MAX_BYTES)
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
                return _parse_header(path, _ValueReader(data), wanted)
    except (struct.error, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged or truncated ({error}): fetch it again") from error


def _parse_header(
    path: AnyPath, values: "_ValueReader", wanted: str | tuple[str, ...]
) -> GGUFHeader:
    magic, version, n_tensors, n_keys = values.numbers("<4sIQQ")
    if magic != MAGIC or version not in (2, 3):
        raise InputError(
            f"{path} is not a GGUF file of version 2 or 3 (little-endian): convert it again"
        )
    if max(n_tensors, n_keys) > _MAX_ENTRIES:
        raise ValueError(f"its header states {n_tensors} tensors and {n_keys} keys")
    keys, metadata = set[str](), dict[str, Any]()
    for _ in range(n_keys):
        key, (value_type,) = values.string(), values.numbers("<I")
        value = values.value(value_type, key.startswith(wanted))
        if value is not None:
            metadata[key] = value
        keys.add(key)
    tensors = [_parse_tensor_info(values) for _ in range(n_tensors)]
    if len(keys) < n_keys or len({tensor.name for tensor in tensors}) < n_tensors:
        raise ValueError("a name occurs twice")
    return GGUFHeader(metadata, tensors, values.position)


def _parse_tensor_info(values: "_ValueReader") -> TensorInfo:
    name, (dims,) = values.string(), values.numbers("<I")
    if dims > _MAX_DIMS:
        raise ValueError(f"a tensor has {dims} dimensions")
    *shape, ggml_type, offset = values.numbers(f"<{dims}QIQ")
    return TensorInfo(name, tuple(reversed(shape)), ggml_type, offset)


class _ValueReader:
    """Reads the values of a header in order."""

    def __init__(self, data: mmap.mmap | bytes):
        self.data, self.position = data, 0

    def read_bytes(self, size: int) -> bytes:
        """Returns the next bytes."""
        part = self.data[self.position : self.position + size]
        if len(part) != size:
            raise ValueError(f"its header extends past byte {len(self.data)}")
        self.position += size
        return part

    def numbers(self, struct_format: str) -> tuple[Any, ...]:
        """Returns the next numbers of a `struct` format."""
        return struct.unpack(struct_format, self.read_bytes(struct.calcsize(struct_format)))

    def string(self) -> str:
        """Returns the next string."""
        return self.read_bytes(*self.numbers("<Q")).decode()

    def value(self, value_type: int, wanted: bool) -> Any:
        """Returns the next value, or None if it is not wanted."""
        if value_type == _STRING:
            value = self.string()
        elif value_type == _ARRAY:
            element_type, length = self.numbers("<IQ")
            value = self._array(element_type, length, wanted)
        else:
            (value,) = self.numbers(_NUMBERS[value_type])
        return value if wanted else None

    def _array(self, element_type: int, length: int, wanted: bool) -> list[Any] | None:
        if element_type in _NUMBERS:
            dtype = np.dtype(_NUMBERS[element_type])
            raw = self.read_bytes(dtype.itemsize * length)
            return np.frombuffer(raw, dtype).tolist() if wanted else None
        if element_type != _STRING or length > _MAX_STRINGS:
            raise ValueError(
                f"its header states an array of {length} values of the type {element_type}"
            )
        if wanted:
            return [self.string() for _ in range(length)]
        for _ in range(length):
            self.read_bytes(*self.numbers("<Q"))
        return None
