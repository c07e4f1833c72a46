"""Reads and writes PyTorch's `.pth` and `.bin` weight files without PyTorch.

A file is a zip archive: `NAME/data.pkl` is a pickle of the dict of tensors, in which each storage
has a key, and `NAME/data/KEY` contains that storage's bytes, uncompressed. `torch_pickle` reads
the pickle; nothing that a file names is imported or called.
"""

import io
import struct
import threading
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike

from llama_jax.convert.files.tensor_file import (
    StoredTensor,
    TensorFileWriter,
    element_span,
    mapped_tensor,
    quote,
)
from llama_jax.convert.files.torch_pickle import (
    DTYPE_NAMES,
    PickledTensor,
    dump_pickle,
    load_pickle,
)
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, open_file, parse_path

_LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_MAX_METADATA = 1 << 20  # bytes of the pickle or the zip directory: more than 6,000 tensors
_CHUNK = 1 << 20  # bytes hashed at a time: they fit the processor's cache
_SAVE_AGAIN = "load it with torch.load and save it again with torch.save"


def read_torch(path: str | AnyPath) -> dict[str, StoredTensor]:
    """Returns the tensors of a PyTorch state dict by name; each is read on demand.

    The state dict may be the value of the key `model` or `state_dict` of another dict, whose other
    keys are ignored. None, numbers and strings in a state dict are ignored too; any other value is
    refused. Tensors may be views and share storages.

    The checksum of the pickle is verified here, the checksum of a storage when one of its tensors
    is first read: that read raises InputError if a byte was changed.

    Raises:
        InputError: the file is missing, cut short, damaged, in another format, compressed,
            big-endian, or asks for a function or class that weights don't need. Nothing in it
            is executed.
    """
    path = parse_path(path)
    try:
        opened: Any = open_file(path)
        raw = opened.detach() if isinstance(opened, io.BufferedReader) else opened
        with _BoundedReader(raw) as file:
            return _read_zip(path, file)
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}: give a PyTorch weight file") from error
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): give another file") from error


class _BoundedReader(io.BufferedReader):
    """A file whose reads are limited: zipfile would read a directory of any size at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        limit = _MAX_METADATA + 1
        data = super().read(limit if size is None or size < 0 else min(size, limit))
        if len(data) == limit:
            raise ValueError("its directory is too large for weights")
        return data


def _read_zip(path: AnyPath, file: BinaryIO) -> dict[str, StoredTensor]:
    head = file.read(64)
    if head[:1] == b"\x80" and _LEGACY_MAGIC in head:
        raise InputError(f"{path} has the format from before PyTorch 1.6: {_SAVE_AGAIN}")
    if head[:2] != b"PK":
        raise InputError(f"{path} is not a PyTorch weight file, or damaged: fetch it again")
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # a damaged directory can make zipfile raise almost anything
        raise InputError(
            f"{path} is cut short or damaged (its zip directory can't be read): fetch it again"
        ) from error

    names = archive.namelist()
    roots = [n.removesuffix("data.pkl") for n in names if n.split("/", 1)[-1] == "data.pkl"]
    if any(n.split("/", 1)[-1] == "constants.pkl" or "/code/" in n for n in names):
        raise InputError(
            f"{path} is a TorchScript archive: load it with torch.jit.load and save its"
            " state_dict() with torch.save"
        )
    if len(roots) != 1 or len(set(names)) != len(names):
        raise InputError(
            f"{path} is a zip archive, but not of one PyTorch state dict: fetch it again"
        )
    (root,) = roots
    reader = _Archive(path, file, archive)
    if f"{root}byteorder" in names and reader.content(f"{root}byteorder") != b"little":
        raise InputError(f"{path} is big-endian: {_SAVE_AGAIN} on a little-endian computer")
    unpickled = load_pickle(path, reader.content(f"{root}data.pkl"))

    tensors: dict[str, StoredTensor] = {}
    for name, value in _state_dict(path, unpickled).items():
        if isinstance(value, PickledTensor):
            tensors[name] = _locate(path, name, value, reader, f"{root}data/{value.storage.key}")
    return tensors


def _state_dict(path: AnyPath, value: Any) -> dict[str, Any]:
    """Returns the state dict in the value of a pickle.

    Raises:
        InputError: there is none, or it contains other values than tensors and plain values.
    """
    if type(value) is not dict:
        kind = "one tensor" if isinstance(value, PickledTensor) else quote(value)
        raise InputError(
            f"{path} contains {kind}, not a state dict: save the model's state_dict() alone"
        )
    for key in ("model", "state_dict"):
        if type(value.get(key)) is dict:
            value = value[key]
            break
    for name, item in value.items():
        if type(name) is not str:
            problem = f"the key {quote(name)} is not a string"
        elif not isinstance(item, PickledTensor | int | float | str | None):
            problem = f"{quote(name)} is {quote(item)}, not a tensor"
        else:
            continue
        raise InputError(f"{path}: {problem}: save the model's state_dict() alone")
    return value


def _locate(
    path: AnyPath, name: str, tensor: PickledTensor, reader: "_Archive", entry: str
) -> StoredTensor:
    """Returns a tensor of the pickle as a tensor in the file, whose bounds are checked.

    Raises:
        InputError: it has an impossible shape, or its storage is missing or too small.
    """
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides

    def damaged(why: str) -> InputError:
        return InputError(f"{path}: {quote(name)} {why}: the file is damaged, fetch it again")

    numbers = [tensor.offset, storage.numel, *shape, *strides]
    dims = len(shape)
    if dims > 32 or dims != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
        raise damaged("has a shape, strides or an offset that no tensor can have")
    zip_entry = reader.find(entry, name)
    size = zip_entry.size
    if size != storage.numel * storage.dtype.itemsize:
        raise damaged(f"has a storage of {size} bytes, not of {storage.numel} {storage.dtype}")
    # The offset of an empty view may be any number, as in PyTorch: no byte is read.
    if 0 not in shape and tensor.offset + element_span(shape, strides) > storage.numel:
        raise damaged("reaches beyond its storage")
    start = zip_entry.begin + tensor.offset * storage.dtype.itemsize
    view = mapped_tensor(path, name, storage.dtype, start, shape, strides)

    def read() -> np.ndarray:
        zip_entry.check(path)
        return view.read()

    return replace(view, read=read)


@dataclass
class _Entry:
    """An entry of the archive, neither compressed nor encrypted."""

    name: str
    begin: int  # offset of its data in the file [bytes]
    size: int  # bytes
    crc: int  # CRC-32 of its data, as stated in the zip directory
    checked: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self, path: AnyPath) -> None:
        """Compares the data with their checksum; does nothing on later calls.

        Raises:
            InputError: the checksum differs, or the data can't be read.
        """
        with self.lock:
            if not self.checked and self._crc32(path) != self.crc:
                if self.crc == 0:  # the effect of torch.serialization.set_crc32_options(False)
                    raise InputError(
                        f"{path} was saved without checksums: load it with torch.load and save it"
                        " again with torch.serialization.set_crc32_options(True)"
                    )
                raise InputError(
                    f"{path}: {quote(self.name)} is damaged (its checksum differs): fetch the file"
                    " again"
                )
            self.checked = True

    def _crc32(self, path: AnyPath) -> int:
        crc, remaining = 0, self.size
        try:
            with open_file(path) as file:
                file.seek(self.begin)
                while remaining and (part := file.read(min(remaining, _CHUNK))):
                    crc, remaining = zlib.crc32(part, crc), remaining - len(part)
            if remaining:
                raise OSError(0, "the file ends too early")
        except OSError as error:
            raise InputError(
                f"{path}: {quote(self.name)} can't be read ({error.strerror}): the file has"
                " changed, start again"
            ) from error
        return crc


class _Archive:
    """Finds the entries of a zip archive; refuses compressed and encrypted ones."""

    def __init__(self, path: AnyPath, file: BinaryIO, archive: zipfile.ZipFile):
        self._path, self._file, self._zip = path, file, archive
        self._size = file.seek(0, io.SEEK_END)
        self._entries: dict[str, _Entry] = {}

    def content(self, entry: str) -> bytes:
        """Returns the data of a small entry after verifying its checksum."""
        found = self.find(entry, entry)
        if found.size > _MAX_METADATA:
            raise InputError(
                f"{self._path}: {quote(entry)} is too large for weights: {_SAVE_AGAIN}"
            )
        found.check(self._path)
        return self._read_at(found.begin, found.size)

    def find(self, entry: str, name: str) -> _Entry:
        """Returns an entry, which the tensor `name` needs.

        Raises:
            InputError: it is missing, compressed, encrypted or not at the stated offset.
        """
        if entry in self._entries:
            return self._entries[entry]
        try:
            info = self._zip.getinfo(entry)
        except KeyError as error:
            raise InputError(
                f"{self._path} lacks {quote(entry)}, which {quote(name)} needs: fetch it again"
            ) from error
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise InputError(
                f"{self._path}: {quote(entry)} is compressed or encrypted: {_SAVE_AGAIN}"
            )
        # The zip directory doesn't contain the length of the local header, which precedes the data.
        # The name in that header, and the signature after the data, show that the header belongs
        # to this entry and that no bytes are missing or inserted.
        encoded = entry.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        local = self._read_at(info.header_offset, 30 + len(encoded))
        begin = info.header_offset + 30 + sum(struct.unpack_from("<HH", local.ljust(30), 26))
        # With flag 8 a checksum follows the data, otherwise the next entry or the directory.
        after = {b"PK\3\4", b"PK\1\2"} if not info.flag_bits & 8 else {b"PK\7\10"}
        if (
            (local[:4], local[30:]) != (b"PK\3\4", encoded)
            or (info.file_size and self._read_at(begin + info.file_size, 4) not in after)
            or info.file_size != info.compress_size
        ):
            raise InputError(
                f"{self._path}: {quote(entry)} isn't at the offset in the zip directory: the file"
                " is cut short or damaged, fetch it again"
            )
        return self._entries.setdefault(entry, _Entry(entry, begin, info.file_size, info.CRC))

    def _read_at(self, begin: int, n: int) -> bytes:
        """Returns the n bytes at an offset, or b"" if the file doesn't contain all of them."""
        if not 0 <= begin <= self._size - n:
            return b""
        self._file.seek(begin)
        return self._file.read(n)


class TorchWriter(TensorFileWriter):
    """Writes a file that `torch.load` reads, also with `mmap=True`, one tensor at a time.

    Each tensor has its own storage, which begins at a multiple of 64 bytes.
    """

    def __init__(self, path: Path, header: Mapping[str, tuple[tuple[int, ...], DTypeLike]]):
        super().__init__(path, header)
        for name, (_, dtype) in self._header.items():
            if dtype not in DTYPE_NAMES:
                raise ValueError(f"PyTorch files can't contain the {dtype} tensor {name}")
        content = dump_pickle(self._header)
        self._keys = {name: str(i) for i, name in enumerate(self._header)}
        self._file = open(self.path, "wb")  # noqa: SIM115 (_close closes it)
        self._zip = zipfile.ZipFile(self._file, "w")
        self._add("data.pkl", memoryview(content))
        self._add("byteorder", memoryview(b"little"))
        self._add("version", memoryview(b"3\n"))

    def _add(self, entry: str, data: memoryview) -> None:
        info = zipfile.ZipInfo(f"{self.path.stem}/{entry}")
        # The data follow a header of 30 bytes, the name, and two extra fields: that of zipfile for
        # large entries (20 bytes), and one that pads to the next multiple of 64, as in PyTorch's
        # own files.
        before = self._file.tell() + 30 + len(info.filename.encode("utf-8")) + 20 + 4
        fill = -before % 64
        info.extra = struct.pack("<2sH", b"FB", fill) + b"Z" * fill
        with self._zip.open(info, "w", force_zip64=True) as file:
            file.write(data)

    def _write_data(self, name: str, data: memoryview) -> None:
        self._add(f"data/{self._keys[name]}", data)

    def _close(self) -> None:
        self._zip.close()
        self._file.close()
