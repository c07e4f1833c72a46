"""Reads and writes safetensors files one tensor at a time.

The format: https://huggingface.co/docs/safetensors/index#format
"""

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from llama_jax.convert.files.tensor_file import StoredTensor, TensorFileWriter, mapped_tensor, quote
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, open_file, parse_path

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Bytes. The format allows 100 MB, which take 2 GB as Python objects; the header of 1,200 tensors
# has 150 KB.
_MAX_HEADER = 16 << 20
_ADVICE = "fetch it again"


def read_safetensors(path: str | AnyPath) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file by name; each is read on demand.

    Checks that every byte of the file belongs to the header or to exactly one tensor, as the format
    requires.

    Raises:
        InputError: the file is missing, cut short or damaged, or has a dtype that NumPy lacks.
    """
    path = parse_path(path)
    try:
        with open_file(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or (size < 8 + length and length <= _MAX_HEADER):
                raise InputError(f"{path} is cut short inside its header: {_ADVICE}")
            if length > _MAX_HEADER:
                raise InputError(f"{path} is not a safetensors file, or damaged: {_ADVICE}")
            raw = file.read(length)
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}: give a safetensors file") from error
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): give another file") from error
    header = _parse(path, raw)

    tensors: dict[str, StoredTensor] = {}
    spans = [(0, 0, "")]
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        tensor = mapped_tensor(path, name, dtype, 8 + length + begin, shape)
        if tensor.nbytes != end - begin:
            problem = f"has {end - begin} bytes, not {tensor.nbytes}"
            raise InputError(f"{path} is damaged: {quote(name)} {problem}: {_ADVICE}")
        tensors[name] = tensor
        spans.append((begin, end, name))

    spans.sort()
    for (_, previous_end, _), (begin, _, name) in itertools.pairwise(spans):
        if begin != previous_end:
            raise InputError(
                f"{path} is damaged: {quote(name)} leaves a gap or overlaps: {_ADVICE}"
            )
    expected = 8 + length + spans[-1][1]
    if size != expected:
        state = "cut short" if size < expected else "damaged"
        raise InputError(f"{path} is {state}: it has {size} bytes, not {expected}: {_ADVICE}")
    return tensors


def _parse(path: AnyPath, raw: bytes) -> dict[str, Any]:
    """Returns the entries of the tensors in a header.

    Raises:
        InputError: the header is not valid JSON, or a key occurs twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(unique_keys := dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return unique_keys

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
        if type(header) is not dict:
            raise ValueError("it is not a table of tensors")
        "".join(header).encode("utf-8")  # JSON can contain half of a surrogate pair, UTF-8 can't
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} has a damaged header ({error}): {_ADVICE}") from error
    header.pop("__metadata__", None)
    return header


def _entry(path: AnyPath, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Returns dtype, shape, begin and end of a tensor; the offsets count from the header's end.

    Raises:
        InputError: the entry is invalid, or its dtype unknown.
    """
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [begin, end]} if all(
            type(n) is int and n >= 0 for n in [*shape, begin, end]
        ):
            if kind in _DTYPES:
                return _DTYPES[kind], tuple(shape), begin, end
            raise InputError(
                f"{path}: {quote(name)} has the dtype {quote(kind)}, which is not supported:"
                f" convert it to one of {', '.join(_DTYPES)}"
            )
    raise InputError(f"{path} has a damaged header (its entry for {quote(name)}): {_ADVICE}")


class SafetensorsWriter(TensorFileWriter):
    """Writes a safetensors file, one tensor at a time: see `TensorFileWriter`.

    The data begin at a multiple of 8 bytes, and the tensors follow without gaps. If dtypes are
    mixed, write the wider ones first: PyTorch doesn't memory-map an unaligned tensor.
    """

    def __init__(self, path: Path, header: Mapping[str, tuple[tuple[int, ...], DTypeLike]]):
        super().__init__(path, header)
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in self._header.items():
            if dtype not in _NAMES or name == "__metadata__":
                raise ValueError(f"safetensors files can't contain the {dtype} tensor {name}")
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            entries[name] = {
                "dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end],
            }  # fmt: skip
        raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        raw += b" " * (-len(raw) % 8)
        if len(raw) > _MAX_HEADER:
            raise ValueError(f"{path} would need a header of more than {_MAX_HEADER} bytes")
        self._file = open(self.path, "wb")  # noqa: SIM115 (_close closes it)
        self._file.write(len(raw).to_bytes(8, "little") + raw)

    def _write_data(self, name: str, data: memoryview) -> None:
        self._file.write(data)

    def _close(self) -> None:
        self._file.close()
