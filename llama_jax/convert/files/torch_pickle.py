"""Reads and writes the pickle inside PyTorch's weight files without executing code from it.

Such a pickle builds dicts, lists, tuples, strings and numbers, and refers to storages and a few
functions by name. The interpreter in this module implements only the opcodes and functions that
weights need; it imports and calls nothing that the pickle names.
"""

import math
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.convert.files.tensor_file import quote, row_major_strides
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath

_STORAGES = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch DoubleStorage": np.dtype(np.float64),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in _STORAGES.items()}
_FUNCTIONS = {
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
}


@dataclass(frozen=True)
class _Global:
    """A module and a name in it, separated by a space: only compared, never imported."""

    name: str


@dataclass(frozen=True)
class PickledStorage:
    """The bytes of one or more tensors, in an entry of the archive."""

    dtype: np.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class PickledTensor:
    """A view of a storage, as stated by the pickle: the caller must check its bounds."""

    storage: PickledStorage
    offset: int  # in elements, like the strides
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]


def load_pickle(path: AnyPath, data: bytes) -> Any:
    """Returns the value of a pickle: strings, numbers, tuples, lists, dicts, `PickledTensor`s.

    Args:
        path: the file that contains the pickle, for messages.
        data: the pickle.

    Raises:
        InputError: it is damaged, or asks for a function or class that weights don't need.
    """
    return _PickleInterpreter(path, data).run()


class _PickleInterpreter:
    """Interprets a pickle of weights.

    Python's Unpickler is not safe even without imports: a pickle can crash it by a dict key that
    is a tuple nested a million deep, or by a memo with four billion slots. This interpreter hashes
    only strings and numbers, doesn't recurse, and needs memory proportional to the pickle's length.
    """

    def __init__(self, path: AnyPath, data: bytes):
        self._path, self._data, self._offset = path, data, 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Returns the value of the pickle."""
        try:
            while (opcode := self._take(1)) != pickle.STOP:
                self._execute(opcode)
            return self._stack.pop()
        except (LookupError, ValueError, struct.error) as error:
            if isinstance(error, InputError):
                raise
            raise self._damaged("an opcode lacks its operands") from error

    def _damaged(self, why: str) -> InputError:
        return InputError(
            f"{self._path} has a damaged pickle ({why} before byte {self._offset}): fetch it again"
        )

    def _take(self, n: int) -> bytes:
        """Returns the next n bytes."""
        data = self._data[self._offset : self._offset + n]
        self._offset += n
        if len(data) < n:
            raise self._damaged("it ends")
        return data

    def _number(self, n: int) -> int:
        return int.from_bytes(self._take(n), "little")

    def _text(self, n: int) -> str:
        return self._take(self._number(n)).decode("utf-8")

    def _line(self) -> str:
        return self._take(self._data.index(b"\n", self._offset) + 1 - self._offset)[:-1].decode(
            "utf-8"
        )

    def _pop(self, n: int) -> list[Any]:
        """Removes the last n values from the stack and returns them."""
        first = len(self._stack) - n
        if first < 0:
            raise self._damaged("an opcode lacks its operands")
        values, self._stack[first:] = self._stack[first:], []
        return values

    def _pop_mark(self) -> list[Any]:
        return self._pop(max(len(self._stack) - self._marks.pop(), 0))

    def _execute(self, opcode: bytes) -> None:
        push = self._stack.append
        match opcode:
            case pickle.PROTO:
                self._take(1)
            case pickle.FRAME:
                self._take(8)
            case pickle.MARK:
                self._marks.append(len(self._stack))
            case pickle.NONE:
                push(None)
            case pickle.NEWTRUE | pickle.NEWFALSE:
                push(opcode == pickle.NEWTRUE)
            case pickle.BININT1:
                push(self._number(1))
            case pickle.BININT2:
                push(self._number(2))
            case pickle.BININT:
                push(int.from_bytes(self._take(4), "little", signed=True))
            case pickle.LONG1:
                push(int.from_bytes(self._take(self._number(1)), "little", signed=True))
            case pickle.BINFLOAT:
                push(struct.unpack(">d", self._take(8))[0])
            case pickle.SHORT_BINUNICODE:
                push(self._text(1))
            case pickle.BINUNICODE:
                push(self._text(4))
            case pickle.EMPTY_DICT:
                push({})
            case pickle.EMPTY_LIST:
                push([])
            case pickle.EMPTY_TUPLE:
                push(())
            case pickle.TUPLE1:
                push(tuple(self._pop(1)))
            case pickle.TUPLE2:
                push(tuple(self._pop(2)))
            case pickle.TUPLE3:
                push(tuple(self._pop(3)))
            case pickle.TUPLE:
                push(tuple(self._pop_mark()))
            case pickle.BINPUT:
                self._memo[self._number(1)] = self._stack[-1]
            case pickle.LONG_BINPUT:
                self._memo[self._number(4)] = self._stack[-1]
            case pickle.MEMOIZE:
                self._memo[len(self._memo)] = self._stack[-1]
            case pickle.BINGET:
                push(self._memo[self._number(1)])
            case pickle.LONG_BINGET:
                push(self._memo[self._number(4)])
            case pickle.APPEND:
                self._extend(self._pop(1))
            case pickle.APPENDS:
                self._extend(self._pop_mark())
            case pickle.SETITEM:
                self._set(self._pop(2))
            case pickle.SETITEMS:
                self._set(self._pop_mark())
            case pickle.BUILD:  # sets attributes of an OrderedDict, which weights don't need
                state, target = self._stack.pop(), self._stack[-1]
                if type(target) is not dict or type(state) is not dict:
                    raise self._damaged("it sets attributes of a value that has none")
            case pickle.GLOBAL:
                push(self._global(self._line(), self._line()))
            case pickle.STACK_GLOBAL:
                push(self._global(*self._pop(2)))
            case pickle.BINPERSID:
                push(self._storage(self._stack.pop()))
            case pickle.REDUCE:
                push(self._call(*self._pop(2)))
            case _:
                raise self._damaged(f"it has the opcode {opcode!r}, which weights don't need,")

    def _extend(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise self._damaged("it appends to a value that is not a list")
        self._stack[-1].extend(values)

    def _set(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not dict or len(items) % 2:
            raise self._damaged("it sets items of a value that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Many larger numbers can share one hash: a dict of them would take quadratic time.
            if type(key) is not str and (type(key) is not int or abs(key) >> 32):
                raise self._damaged("a key of a dict is neither text nor a small number")
            self._stack[-1][key] = value

    def _global(self, module: Any, name: Any) -> _Global:
        known = f"{module} {name}" if type(module) is str and type(name) is str else ""
        if known not in _STORAGES and known not in _FUNCTIONS:
            function = f"{module}.{name}" if known else "a function without a name"
            raise InputError(
                f"{self._path} asks for {quote(function)}, which weights don't need (nothing was"
                " run): if you trust the file, load it with torch.load and save only its"
                " state_dict()"
            )
        return _Global(known)

    def _storage(self, key: Any) -> PickledStorage:
        match key:
            case ("storage", _Global(name), str(entry), _, int(numel)) if name in _STORAGES:
                return PickledStorage(_STORAGES[name], entry, numel)
        raise self._damaged("a storage's name has another form")

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or type(arguments) is not tuple:
            raise self._damaged("it calls a value that is not a function")
        match (function.name, *arguments):
            case ("collections OrderedDict",):
                return {}
            case ("torch Size", tuple(lengths)):
                return lengths
            case ("torch device", str(kind)) | ("torch device", str(kind), _):
                return kind
            case ("torch._utils _rebuild_tensor_v2", storage, int(offset), shape, strides, _, _):
                if isinstance(storage, PickledStorage) and type(shape) is type(strides) is tuple:
                    return PickledTensor(storage, offset, shape, strides)
            case ("torch._utils _rebuild_parameter", PickledTensor() as tensor, _, _):
                return tensor
            case ("torch._utils _rebuild_parameter_with_state", PickledTensor() as tensor, _, _, _):
                return tensor
        raise self._damaged(f"{function.name} has other arguments than a tensor of weights")


def dump_pickle(header: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """Returns the pickle of a dict of tensors whose storages are numbered in its order."""

    def string(value: str) -> bytes:
        raw = value.encode("utf-8")
        return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw

    def number(value: int) -> bytes:
        return pickle.dumps(value, 2)[2:-1]  # without PROTO and STOP

    def tuple_(*items: bytes) -> bytes:
        return pickle.MARK + b"".join(items) + pickle.TUPLE

    def global_name(name: str) -> bytes:
        return pickle.GLOBAL + name.replace(" ", "\n").encode() + b"\n"

    parts = [pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.MARK]
    for i, (name, (shape, dtype)) in enumerate(header.items()):
        numel = number(math.prod(shape))
        kind = global_name(DTYPE_NAMES[dtype])
        storage = (
            tuple_(string("storage"), kind, string(str(i)), string("cpu"), numel) + pickle.BINPERSID
        )
        hooks = global_name("collections OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
        sizes = tuple_(*map(number, shape)) + tuple_(*map(number, row_major_strides(shape)))
        tensor = tuple_(storage, number(0), sizes, pickle.NEWFALSE, hooks)
        parts += [
            string(name),
            global_name("torch._utils _rebuild_tensor_v2"),
            tensor,
            pickle.REDUCE,
        ]
    parts.append(pickle.SETITEMS + pickle.STOP)
    return b"".join(parts)
