"""The pickle inside PyTorch's files of weights: run without running anything, and written.

It makes dicts, lists, tuples, strings and numbers, and names storages and a handful of functions.
The machine here knows the opcodes and functions that weights need, and imports or calls none.
"""

import math
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.convert.files.tensor_file import quote, row_major_strides
from llama_jax.errors import InputError

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
    """A module and a name in it, with a space between: only ever compared."""

    name: str


@dataclass(frozen=True)
class PickledStorage:
    """The bytes of one tensor or more, in the archive under a key."""

    dtype: np.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class PickledTensor:
    """A view of a storage, as the pickle says: nothing about it is checked yet."""

    storage: PickledStorage
    offset: int  # this and the strides count elements
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]


def load_pickle(path: Path, data: bytes) -> Any:
    """Returns what a pickle makes of strings, numbers, tuples, lists, dicts and `PickledTensor`s.

    Args:
        path: the file that holds it, for messages.
        data: the pickle.

    Raises:
        InputError: it is damaged, or asks for a function or class that weights don't need.
    """
    return _Machine(path, data).run()


class _Machine:
    """Runs a pickle of weights.

    Python's own Unpickler isn't used: a pickle can crash it (by a dict's key that is a tuple a
    million deep, or a memo of four billion places) without any import. Here nothing is hashed
    but strings and numbers, nothing recurses, and nothing grows faster than the pickle is long.
    """

    def __init__(self, path: Path, data: bytes):
        self._path, self._data, self._at = path, data, 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Returns what the pickle makes."""
        try:
            while (op := self._take(1)) != pickle.STOP:
                self._step(op)
            return self._stack.pop()
        except (LookupError, ValueError, struct.error) as error:
            if isinstance(error, InputError):
                raise
            raise self._damaged("an opcode lacks its operands") from error

    def _damaged(self, why: str) -> InputError:
        return InputError(
            f"{self._path} has a damaged pickle ({why} before byte {self._at}): fetch it again"
        )

    def _take(self, n: int) -> bytes:
        taken = self._data[self._at : self._at + n]
        self._at += n
        if len(taken) < n:
            raise self._damaged("it ends")
        return taken

    def _number(self, n: int) -> int:
        return int.from_bytes(self._take(n), "little")

    def _text(self, n: int) -> str:
        return self._take(self._number(n)).decode("utf-8")

    def _line(self) -> str:
        return self._take(self._data.index(b"\n", self._at) + 1 - self._at)[:-1].decode("utf-8")

    def _pop(self, n: int) -> list[Any]:
        """Takes the last n values off the stack."""
        first = len(self._stack) - n
        if first < 0:
            raise self._damaged("an opcode lacks its operands")
        values, self._stack[first:] = self._stack[first:], []
        return values

    def _pop_mark(self) -> list[Any]:
        return self._pop(max(len(self._stack) - self._marks.pop(), 0))

    def _step(self, op: bytes) -> None:
        push = self._stack.append
        match op:
            case pickle.PROTO:
                self._take(1)
            case pickle.FRAME:
                self._take(8)
            case pickle.MARK:
                self._marks.append(len(self._stack))
            case pickle.NONE:
                push(None)
            case pickle.NEWTRUE | pickle.NEWFALSE:
                push(op == pickle.NEWTRUE)
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
            case pickle.BUILD:  # an OrderedDict's attributes, of which weights need none
                state, target = self._stack.pop(), self._stack[-1]
                if type(target) is not dict or type(state) is not dict:
                    raise self._damaged("it sets the attributes of what has none")
            case pickle.GLOBAL:
                push(self._global(self._line(), self._line()))
            case pickle.STACK_GLOBAL:
                push(self._global(*self._pop(2)))
            case pickle.BINPERSID:
                push(self._storage(self._stack.pop()))
            case pickle.REDUCE:
                push(self._call(*self._pop(2)))
            case _:
                raise self._damaged(f"it has the opcode {op!r}, which weights don't need,")

    def _extend(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise self._damaged("it appends to what is no list")
        self._stack[-1].extend(values)

    def _set(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not dict or len(items) % 2:
            raise self._damaged("it sets the items of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Of larger numbers, any number could have one hash, and each would search all before.
            if type(key) is not str and (type(key) is not int or abs(key) >> 32):
                raise self._damaged("a key of a dict is neither text nor a small number")
            self._stack[-1][key] = value

    def _global(self, module: Any, name: Any) -> _Global:
        known = f"{module} {name}" if type(module) is str and type(name) is str else ""
        if known not in _STORAGES and known not in _FUNCTIONS:
            wanted = f"{module}.{name}" if known else "what has no name"
            raise InputError(
                f"{self._path} asks for {quote(wanted)}, which weights don't need (nothing was"
                " run): where you trust the file, load it with torch.load and save its"
                " state_dict() alone"
            )
        return _Global(known)

    def _storage(self, key: Any) -> PickledStorage:
        match key:
            case ("storage", _Global(name), str(entry), _, int(numel)) if name in _STORAGES:
                return PickledStorage(_STORAGES[name], entry, numel)
        raise self._damaged("a storage's name has another form")

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or type(arguments) is not tuple:
            raise self._damaged("it calls what is no function")
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
    """Returns the pickle of a dict of tensors, whose storages are numbered in its order."""

    def text(value: str) -> bytes:
        raw = value.encode("utf-8")
        return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw

    def number(value: int) -> bytes:
        return pickle.dumps(value, 2)[2:-1]  # without its PROTO and STOP

    def many(*items: bytes) -> bytes:
        return pickle.MARK + b"".join(items) + pickle.TUPLE

    def known(name: str) -> bytes:
        return pickle.GLOBAL + name.replace(" ", "\n").encode() + b"\n"

    parts = [pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.MARK]
    for i, (name, (shape, dtype)) in enumerate(header.items()):
        numel = number(math.prod(shape))
        kind = known(DTYPE_NAMES[dtype])
        storage = many(text("storage"), kind, text(str(i)), text("cpu"), numel) + pickle.BINPERSID
        hooks = known("collections OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
        sizes = many(*map(number, shape)) + many(*map(number, row_major_strides(shape)))
        tensor = many(storage, number(0), sizes, pickle.NEWFALSE, hooks)
        parts += [text(name), known("torch._utils _rebuild_tensor_v2"), tensor, pickle.REDUCE]
    parts.append(pickle.SETITEMS + pickle.STOP)
    return b"".join(parts)
