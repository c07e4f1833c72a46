"""Writes folders and files atomically: each appears complete under its name, or not at all.

The writer fills `.NAME.partial-XXXXXXXX` in the same folder, renames it to NAME at the end, and
holds an flock on `.NAME.lock` meanwhile. The system releases the lock when the writer ends, for
whatever reason. So the process that holds the lock knows that dead processes left all other partial
files of this name, and removes them. A process id would prove less: ids are reused, and are
meaningless on another host of a shared file system.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_jax.errors import Fault, InputError
from llama_jax.runtime.bucket_path import BucketPath
from llama_jax.runtime.damage import root_cause
from llama_jax.runtime.storage import AnyPath, parse_path, read_many, remove_tree, system_errno

INCOMPLETE = ".incomplete"  # in a bucket, while a folder is being written
_SHARED_MARK = b"several processes"  # the content of that file if they write the folder

# Errors of the path itself: a file among its folders, a link to itself, a name that is too long.
_BAD_NAME = (errno.EEXIST, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


@contextlib.contextmanager
def new_folder(path: str | AnyPath) -> Iterator[AnyPath]:
    """Yields an empty folder to fill, and renames it to `path` when the block ends.

    An error in the block removes the folder. In a bucket, which can't rename, it yields `path`
    itself, and `.incomplete` marks the folder until the block ends.

    Raises:
        InputError: `path` exists or is impossible, or another process is writing it.
        Fault: the system can't write it.
    """
    path = parse_path(path)
    if isinstance(path, BucketPath):
        with _new_bucket_folder(path):
            yield path
        return
    check_absent(path)
    with _faults(path), _partial(path, wait=False) as partial:
        check_absent(path)  # another process may have finished it meanwhile
        partial.mkdir()
        yield partial
        try:
            partial.rename(path)
        except OSError as error:  # without locks another process may have won
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise _exists(path) from error
            raise


@contextlib.contextmanager
def _new_bucket_folder(path: BucketPath) -> Iterator[None]:
    """Fills a folder in a bucket. A folder that is marked as incomplete is a leftover.

    Raises:
        InputError: `path` exists, or another process has started to write it meanwhile.
        Fault: the store can't be written.
    """
    check_absent(path)
    mark, writer = path / INCOMPLETE, secrets.token_hex(8)

    def is_ours() -> bool:
        return read_many(path, [INCOMPLETE])[INCOMPLETE] == writer.encode()

    with _faults(path):
        remove_tree(path)
        mark.write_text(writer)
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # the store's own error is raised already
                if is_ours():
                    remove_tree(path)
            raise
        if not is_ours():
            raise InputError(f"another process is writing {path}: choose another folder")
        mark.unlink()


@dataclass(frozen=True)
class Unfinished:
    """A folder that several processes or attempts fill: it survives them, and is published once."""

    path: AnyPath  # of the complete folder

    @property
    def work(self) -> AnyPath:
        """Folder of intermediate files."""
        if isinstance(self.path, BucketPath):
            return self.path / ".unfinished"
        return self.path.with_name(f".{self.path.name}.unfinished")

    @property
    def final(self) -> AnyPath:
        """The folder that will be at `path`: in a bucket, which can't rename, `path` itself."""
        return self.path if isinstance(self.path, BucketPath) else self.work / "final"

    @property
    def done(self) -> AnyPath:
        """Folder of the files by which finished tasks are known."""
        return self.work / "done"

    def publish(self) -> None:
        """Makes the folder appear at `path`, and removes the intermediate files.

        Raises:
            OSError: the system can't do this.
        """
        if isinstance(self.path, BucketPath):
            remove_tree(self.work)
            (self.path / INCOMPLETE).unlink()
        else:
            # In one step, and first: if this process is killed before everything is removed, and
            # the published folder is removed later, no task may count as done.
            published = self.work / "published"
            remove_tree(published)
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                os.rename(str(self.done), str(published))
            if not self.path.exists():  # else another process has published it
                os.rename(str(self.final), self.path)
            remove_tree(self.work)

    def discard(self) -> None:
        """Removes everything."""
        remove_tree(self.path if isinstance(self.path, BucketPath) else self.work)


@contextlib.contextmanager
def unfinished_folder(path: str | AnyPath, *, shared: bool = False) -> Iterator[Unfinished]:
    """Yields the unfinished folder of `path`, with the files that killed processes left in it.

    The block publishes it.

    Args:
        path: of the complete folder.
        shared: whether other processes fill it at the same time.

    Raises:
        InputError: `path` exists or is impossible, or a process that doesn't share it writes it.
        Fault: the system can't write it.
    """
    folder = Unfinished(parse_path(path))
    path = folder.path
    if isinstance(path, BucketPath):
        check_absent(path)
        with _faults(path):
            mark, found = path / INCOMPLETE, read_many(path, [INCOMPLETE])[INCOMPLETE]
            if found != _SHARED_MARK:  # new, or a leftover of `new_folder`
                remove_tree(path)
                mark.write_bytes(_SHARED_MARK)
            yield folder
        return
    with _faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path, wait=False, shared=shared) as locked:
            if is_written(path):
                if locked and not shared:
                    remove_tree(folder.work)  # of a process that was killed after it had published
                raise _exists(path)
            yield folder


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yields the path of a file to write, and renames it to `path` when the block ends.

    An error in the block removes the file and leaves `path` unchanged.

    Raises:
        InputError: `path` is impossible.
        Fault: the system can't write it.
    """
    path = Path(path)
    with _faults(path), _partial(path, wait=True) as partial:
        yield partial
        partial.replace(path)


def check_absent(path: str | AnyPath) -> None:
    """Checks that `path` doesn't exist. A leftover in a bucket doesn't count.

    Raises:
        InputError: it exists.
    """
    path = parse_path(path)
    if is_written(path):
        raise _exists(path)


def is_written(path: AnyPath) -> bool:
    """Returns whether a file or a folder exists. A leftover in a bucket doesn't count."""
    if isinstance(path, BucketPath):
        return path.exists() and not (path / INCOMPLETE).is_file()
    return os.path.lexists(path)


def _exists(path: AnyPath) -> InputError:
    return InputError(f"{path} already exists: choose another name, or move it away")


@contextlib.contextmanager
def _faults(path: AnyPath) -> Iterator[None]:
    """Converts an error of the system into a `Fault` or `InputError` that includes its text."""
    try:
        yield
    except (InputError, Fault, BrokenPipeError):
        raise
    except Exception as error:
        if number := system_errno(error):
            raise Fault(f"can't write {path}: {os.strerror(number)}") from error
        if isinstance(path, BucketPath):
            if isinstance(error, OSError | ValueError) and str(path) in str(error):
                raise Fault(f"can't write {path}: {root_cause(error)}") from error
            raise
        if isinstance(error, OSError) and _is_about(error, path):
            if error.errno in _BAD_NAME:
                raise InputError(
                    f"can't write at {path} ({error.strerror}): choose another path"
                ) from error
            raise Fault(f"can't write {path}: {error.strerror or error}") from error
        raise


def _is_about(error: OSError, path: Path) -> bool:
    """Returns whether an error names no file, or one in the folder of `path`."""
    if not isinstance(error.filename, str | os.PathLike):
        return True
    return Path(error.filename).absolute().is_relative_to(path.parent.absolute())


@contextlib.contextmanager
def _partial(path: Path, *, wait: bool) -> Iterator[Path]:
    """Yields an unused path in the same folder as `path`, and removes the entry after the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, wait=wait) as locked:
        prefix = f".{path.name}.partial-"
        if locked:
            for entry in list(path.parent.iterdir()):
                if re.fullmatch(re.escape(prefix) + "[0-9a-f]{8}", entry.name):
                    remove_tree(entry)
        partial = path.with_name(prefix + secrets.token_hex(4))
        try:
            yield partial
        finally:
            remove_tree(partial)  # does nothing if it was renamed


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool, shared: bool = False) -> Iterator[bool]:
    """Locks `path` for writing; yields False on a file system without locks.

    Args:
        wait: wait for another process that holds the lock.
        shared: whether other processes may hold it too, if they share it.

    Raises:
        InputError: another process holds the lock, and `wait` is False.
    """
    name = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as opened:
        while True:
            lock = opened.enter_context(open(name, "a"))
            try:
                kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.flock(lock, kind | (0 if wait else fcntl.LOCK_NB))
                locked = True
            except BlockingIOError as error:
                raise InputError(
                    f"another process is writing {path}: wait for it, or choose another folder"
                ) from error
            except OSError:
                locked = False
            # The previous holder of the lock may have removed this file meanwhile.
            if not locked or _is_at(lock.fileno(), name):
                break
            opened.close()
        opened.callback(_unlink_lock, lock.fileno(), name)  # before the lock is released
        yield locked


def _unlink_lock(file: int, path: Path) -> None:
    """Removes the file of a lock, unless other processes share it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    except OSError:  # a file system without locks
        pass
    path.unlink(missing_ok=True)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
