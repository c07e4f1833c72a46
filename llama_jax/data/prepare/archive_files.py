"""Reads the files in an archive or a folder, one after the other, without extracting them."""

import contextlib
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from llama_jax.data.text_files import name_read_errors, open_plain
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, list_files, open_file

_TAR_ENDS = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_ZIP_ENDS = (".zip", ".whl")
_BLOCK = 1 << 20  # bytes


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


def read_archive(path: AnyPath) -> Iterator[ArchiveFile]:
    """Yields the regular files of an archive in its order, or of a folder in order of their names.

    Links and special files are left out. A .tar is read as a stream.

    Raises:
        InputError: the archive can't be read, or is damaged or truncated.
    """
    if not is_archive(path):
        for file in sorted(list_files(path)):
            name = str(file)[len(str(path)) :].strip("/")
            if not name.startswith(".git/"):
                yield ArchiveFile(name, _reader(file))
        return
    read = _read_zip if path.name.lower().endswith(_ZIP_ENDS) else _read_tar
    with open_plain(path) as file, _named_errors(path):
        yield from read(file, path)


@contextlib.contextmanager
def _named_errors(path: AnyPath) -> Iterator[None]:
    """Names the archive in the errors of reading it.

    `ArchiveFile.read` needs this too: its errors don't pass through the generator.
    """
    try:
        with name_read_errors(path):
            yield
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged or truncated ({error}): fetch it again") from error


def _read_zip(file: IO[bytes], path: AnyPath) -> Iterator[ArchiveFile]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.flag_bits & 1:
                raise InputError(f"{path}: {info.filename} is encrypted: decrypt the archive")
            if not info.is_dir():
                yield ArchiveFile(info.filename, _zip_reader(archive, info, path))


def _read_tar(file: IO[bytes], path: AnyPath) -> Iterator[ArchiveFile]:
    with tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            if member.isfile():
                read = _tar_reader(archive, member, path)
                yield ArchiveFile(member.name.removeprefix("./"), read)
    while file.read(_BLOCK):  # the checksum of a .gz or .xz is after the end of the archive
        pass


def _reader(path: AnyPath) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        with name_read_errors(path), open_file(path) as file:
            return file.read(size)

    return read


def _zip_reader(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: AnyPath
) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        with _named_errors(path), archive.open(info) as file:
            return file.read(size)

    return read


def _tar_reader(
    archive: tarfile.TarFile, member: tarfile.TarInfo, path: AnyPath
) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        with _named_errors(path):
            file = archive.extractfile(member)
            return file.read(size) if file else b""

    return read
