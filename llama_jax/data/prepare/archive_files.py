"""Reads the files in an archive or a folder, one after the other, without extracting them."""

import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from llama_jax.data.text_files import open_plain
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, list_files, open_file

_TAR_ENDS = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_ZIP_ENDS = (".zip", ".whl")


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
    with open_plain(path) as file:
        try:
            if path.name.lower().endswith(_ZIP_ENDS):
                yield from _read_zip(file, path)
            else:
                yield from _read_tar(file)
        except (tarfile.TarError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is damaged or truncated ({error}): fetch it again") from error


def _read_zip(file: IO[bytes], path: AnyPath) -> Iterator[ArchiveFile]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.flag_bits & 1:
                raise InputError(f"{path}: {info.filename} is encrypted: decrypt the archive")
            if not info.is_dir():
                yield ArchiveFile(info.filename, _zip_reader(archive, info))


def _read_tar(file: IO[bytes]) -> Iterator[ArchiveFile]:
    with tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            if member.isfile():
                yield ArchiveFile(member.name.removeprefix("./"), _tar_reader(archive, member))


def _reader(path: AnyPath) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        with open_file(path) as file:
            return file.read(size)

    return read


def _zip_reader(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        with archive.open(info) as file:
            return file.read(size)

    return read


def _tar_reader(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        file = archive.extractfile(member)
        return file.read(size) if file else b""

    return read
