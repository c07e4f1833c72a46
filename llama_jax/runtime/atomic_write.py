"""Writes a folder or a file beside its place and renames it: complete under its name, or absent.

While it is written it is called `.NAME.partial-XXXXXXXX`, and its writer holds an flock on
`.NAME.lock`. The system releases that lock when the writer ends, whatever ends it. So whoever holds
the lock knows that every partial of this name is the leftover of a dead process, and removes it. A
process id would prove less: ids are used again, and mean nothing on another host of a shared file
system.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from llama_jax.errors import Fault, InputError

# A file among the folders of a path, a link to itself, a name that is too long: not the system's
# fault.
_BAD_NAME = (errno.EEXIST, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty folder to fill, which is called `path` once the block ends without an error.

    After an error the folder is removed.

    Raises:
        InputError: `path` exists, can't exist, or another process is writing it.
        Fault: the system can't write it.
    """
    path = Path(path)
    check_absent(path)
    with _faults(path), _partial(path, wait=False) as partial:
        check_absent(path)  # another process may have finished it meanwhile
        partial.mkdir()
        yield partial
        try:
            partial.rename(path)
        except OSError as error:  # without locks another process can be faster
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise _exists(path) from error
            raise


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yields the path of a file to write, which replaces `path` once the block ends without error.

    After an error the file is removed, and `path` stays as it was.

    Raises:
        InputError: `path` can't exist.
        Fault: the system can't write it.
    """
    path = Path(path)
    with _faults(path), _partial(path, wait=True) as partial:
        yield partial
        partial.replace(path)


def check_absent(path: str | Path) -> None:
    """Checks that nothing is called `path`.

    Raises:
        InputError: something is.
    """
    if os.path.lexists(path):
        raise _exists(path)


def _exists(path: str | Path) -> InputError:
    return InputError(f"{path} is already there: choose another name, or move it away")


@contextlib.contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Turns an error of the system into a sentence with its own text."""
    try:
        yield
    except (Fault, BrokenPipeError):
        raise
    except Exception as error:
        # TensorStore, which writes for Orbax, raises other types and gives the number in its text.
        number = re.search(r"\[os_error_code='(\d+)'\]", str(error))
        if number:
            raise Fault(f"can't write {path}: {os.strerror(int(number[1]))}") from error
        if isinstance(error, OSError) and _concerns(error, path):
            if error.errno in _BAD_NAME:
                raise InputError(
                    f"nothing can be written at {path} ({error.strerror}): choose another place"
                ) from error
            raise Fault(f"can't write {path}: {error.strerror or error}") from error
        raise


def _concerns(error: OSError, path: Path) -> bool:
    """Tells whether an error is about `path` or its partial, as far as it names a file."""
    if not isinstance(error.filename, str | os.PathLike):
        return True
    return Path(error.filename).absolute().is_relative_to(path.parent.absolute())


@contextlib.contextmanager
def _partial(path: Path, *, wait: bool) -> Iterator[Path]:
    """Yields a name beside `path` that is not taken; nothing is there once the block has ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, wait=wait) as locked:
        prefix = f".{path.name}.partial-"
        if locked:
            for entry in list(path.parent.iterdir()):
                if re.fullmatch(re.escape(prefix) + "[0-9a-f]{8}", entry.name):
                    _remove(entry)
        partial = path.with_name(prefix + secrets.token_hex(4))
        try:
            yield partial
        finally:
            _remove(partial)  # nothing is there if it was renamed


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Locks the writing of `path`; yields False on a file system that has no locks.

    Raises:
        InputError: another process holds the lock, and we don't wait for it.
    """
    name = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as held:
        while True:
            lock = held.enter_context(open(name, "a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                locked = True
            except BlockingIOError as error:
                raise InputError(
                    f"another process is writing {path}: wait for it, or choose another folder"
                ) from error
            except OSError:
                locked = False
            # The process that held the lock before may have removed this file meanwhile.
            if not locked or _is_at(lock.fileno(), name):
                break
            held.close()
        held.callback(name.unlink, missing_ok=True)  # before the lock is released
        yield locked


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
