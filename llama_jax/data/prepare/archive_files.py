"""Reads the files in an archive or a folder, one after the other, without extracting them."""

import bz2
import contextlib
import gzip
import lzma
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, list_files, open_file

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_OPEN: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".tgz": gzip.open,
    ".bz2": bz2.open,
    ".tbz2": bz2.open,
    ".xz": lzma.open,
    ".txz": lzma.open,
    ".zst": zstd.open,
}
_TAR_ENDS = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_ZIP_ENDS = (".zip", ".epub", ".whl")
_DAMAGE = (
    EOFError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    zstd.ZstdError,
)


class ArchiveFile(NamedTuple):
    """A file of an archive. Read it before you take the next one.

    Attributes:
        name: the path in the archive, with `/`.
        read: returns the first bytes, at most as many as its argument says.
    """

    name: str
    read: Callable[[int], bytes]


def is_archive(path: AnyPath) -> bool:
    """Returns whether the name of a file is that of an archive."""
    return path.name.lower().endswith(_TAR_ENDS + _ZIP_ENDS)


@contextlib.contextmanager
def open_decompressed(path: AnyPath) -> Iterator[IO[bytes]]:
    """Opens a file, plain or compressed (.gz .bz2 .xz .zst), for reading its content.

    Raises:
        InputError: the file can't be read, or is damaged or truncated.
    """
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(open_file(path))
            if decompress := _OPEN.get(path.suffix.lower()):
                file = stack.enter_context(decompress(file))
            yield file
    except _DAMAGE as error:
        raise InputError(f"{path} is damaged or truncated ({error}): fetch it again") from error
    except OSError as error:
        if error.errno is None:  # bz2 and gzip report damage so
            raise InputError(f"{path} is damaged or truncated ({error}): fetch it again") from error
        raise InputError(f"can't read {path}: {error.strerror or error}") from error


def read_archive(path: AnyPath) -> Iterator[ArchiveFile]:
    """Yields the regular files of an archive in its order, or of a folder in order of their names.

    Links and special files are left out. An archive is read as a stream.

    Raises:
        InputError: the archive can't be read, or is damaged or truncated.
    """
    if not is_archive(path):
        for file in sorted(list_files(path)):
            yield ArchiveFile(str(file)[len(str(path)) :].strip("/"), _reader(file))
        return
    with open_decompressed(path) as file:
        if path.name.lower().endswith(_ZIP_ENDS):
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    if not info.is_dir():
                        yield ArchiveFile(info.filename, _zip_reader(archive, info))
            return
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                if member.isfile():
                    yield ArchiveFile(member.name.removeprefix("./"), _tar_reader(archive, member))


def _reader(path: AnyPath) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        with open_decompressed(path) as file:
            return file.read(size)

    return read


def _zip_reader(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        if info.flag_bits & 1:
            raise InputError(f"{archive.filename}: {info.filename} is encrypted: decrypt it first")
        with archive.open(info) as file:
            return file.read(size)

    return read


def _tar_reader(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        file = archive.extractfile(member)
        return file.read(size) if file else b""

    return read
