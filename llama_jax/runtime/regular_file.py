"""Opens files from outside of this program: regular ones of a bounded size.

A path may name a pipe, on which a plain `open` waits forever, a device that never ends, or a
sparse file that is larger than any memory.
"""

import os
import stat
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

from llama_jax.errors import InputError

# Largest file that is read at once. The largest tokenizers and indexes of models have 35 MB.
MAX_BYTES = 64 << 20
# Largest file of a checkpoint: far above a chunk, which has at most 16 MiB.
_MAX_PART = 4 << 30
_KINDS = {
    stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
}  # fmt: skip


def open_regular(path: str | Path) -> BufferedReader:
    """Opens a regular file, or a link to one, for reading.

    Raises:
        InputError: the path is of another kind.
        OSError: as `open`.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    kind = stat.S_IFMT(os.fstat(file).st_mode)
    if kind != stat.S_IFREG:
        os.close(file)
        raise _not_regular(path, kind)
    return open(file, "rb")


def _not_regular(path: str | Path, kind: int) -> InputError:
    return InputError(
        f"{path} is {_KINDS.get(kind, 'something else')}, not a regular file: give a file, or a"
        " link to one"
    )


def read_regular(path: str | Path) -> bytes:
    """Returns the content of a regular file.

    Raises:
        InputError: the path is of another kind, or the file has more than `MAX_BYTES`.
        OSError: as `open` and `read`.
    """
    with open_regular(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise InputError(
            f"{path} has more than {MAX_BYTES >> 20} MiB, too many for a file of this kind: fetch"
            " it again"
        )
    return data


def check_regular_files(folder: Path) -> None:
    """Checks a folder whose files a library reads into memory, each at once.

    Raises:
        InputError: the folder contains anything but folders and regular files, or a file larger
            than a part of a checkpoint can be: it could exhaust the memory of the process.
    """
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            with suppress(FileNotFoundError):  # a link to nowhere, or a file just removed
                status = path.stat()
                if not stat.S_ISREG(status.st_mode):
                    raise _not_regular(path, stat.S_IFMT(status.st_mode))
                if status.st_size > _MAX_PART:
                    raise InputError(
                        f"{path} has {status.st_size:,} bytes, too many for a part of a model:"
                        " fetch it again"
                    )
