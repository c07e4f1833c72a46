"""Locks the folder of a run, on disks and in buckets, so that only one run trains in it."""

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator

from llama_jax.errors import Fault, InputError
from llama_jax.runtime import hosts
from llama_jax.runtime.bucket_path import BucketPath
from llama_jax.runtime.console import print_status
from llama_jax.runtime.storage import AnyPath, read_many, write_file

VISIBLE_SECONDS = 60.0  # in this time any network file system shows the writes of another host
BEAT_SECONDS = 5.0  # between two heartbeats of a run in a bucket
# A run without a heartbeat for this long is dead, or is cut off from the bucket. Several times the
# time between two, because requests may be repeated.
WATCH_SECONDS = 20.0
_MARK, _BEAT = ".lock", ".heartbeat"


class FolderLock:
    """The lock of a folder that this run has locked.

    Object stores have no locks. There the file `.lock` contains the mark of the run that owns the
    folder, and the owner renews the file `.heartbeat`. While it does, other runs refuse to start.
    When it doesn't, the next run takes the folder over. If the former owner was only cut off from
    the store, it finds another mark when it returns, and stops.
    """

    def __init__(self, folder: AnyPath, mark: str):
        self._folder, self._mark = folder, mark
        self._lost = False

    def check(self) -> None:
        """Asks the store whether this run still owns the folder.

        Raises:
            Fault: another run has taken it over.
            OSError: the store can't be read.
        """
        if isinstance(self._folder, BucketPath):
            found = read_many(self._folder, [_MARK])[_MARK]
            self._lost = self._lost or found != self._mark.encode()
        self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """Raises if a heartbeat found that another run owns the folder. Sends no request.

        Raises:
            Fault: another run has taken it over.
        """
        if self._lost:
            raise Fault(f"another run has taken over {self._folder}: this one stops")

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Renews the heartbeat in a thread during the block, and removes it at its end."""
        ended = threading.Event()

        def beat() -> None:
            while not self._lost:
                # A store that fails is reported by the next save.
                with contextlib.suppress(OSError, Fault):
                    self.check()
                    write_file(self._folder / _BEAT, f"{self._mark} {time.time()}".encode())
                if ended.wait(BEAT_SECONDS):
                    return

        thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            # A request that is under way ends within the limits of `bucket_path`. Otherwise it
            # could write the heartbeat after its removal, and TensorStore aborts a process that
            # exits while one of its calls runs.
            thread.join()
            with contextlib.suppress(OSError, Fault):
                self.check()
                (self._folder / _BEAT).unlink()


@contextlib.contextmanager
def lock_folder(folder: AnyPath) -> Iterator[FolderLock]:
    """Creates a folder, and locks it against other runs during the block. All hosts call this.

    Raises:
        InputError: another run has locked it, it can't be written, or hosts don't share it.
        Fault: the bucket can't be read or written.
    """
    with contextlib.ExitStack() as opened:
        mark = hosts.broadcast_decision(lambda: _lock(folder, opened))
        _check_shared(folder, mark)
        lock = FolderLock(folder, mark)
        if hosts.is_host_zero() and isinstance(folder, BucketPath):
            opened.enter_context(lock.beating())
        yield lock


def _lock(folder: AnyPath, opened: contextlib.ExitStack) -> str:
    """Locks the folder until `opened` closes; returns the random mark in the lock file."""
    mark = os.urandom(8).hex()
    if isinstance(folder, BucketPath):
        try:
            _watch_heartbeat(folder)
            (folder / _MARK).write_text(mark)
        except OSError as error:
            raise Fault(f"can't write the run folder {folder}: {error.strerror}") from error
        return mark
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / _MARK, "a")  # noqa: SIM115 (`opened` closes it)
    except OSError as error:
        raise InputError(f"can't write the run folder {folder}: {error.strerror}") from error
    opened.enter_context(lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise _is_locked(folder) from error
    lock.truncate(0)
    lock.write(mark)
    lock.flush()
    os.fsync(lock.fileno())
    return mark


def _watch_heartbeat(folder: BucketPath) -> None:
    """Waits until the last run in a folder has ended, or no longer renews its heartbeat.

    No clock is compared: those of two hosts may differ.

    Raises:
        InputError: it renews its heartbeat.
    """
    start, first, newest = time.monotonic(), None, None
    while True:
        newest = read_many(folder, [_BEAT])[_BEAT]
        if newest is None:
            return
        if first is None:
            first = newest
            print_status(
                f"{folder}: the last run did not end normally; watching for {WATCH_SECONDS:.0f} s"
                " whether it still trains"
            )
        if time.monotonic() - start > WATCH_SECONDS:
            break
        time.sleep(WATCH_SECONDS / 20)
    if newest != first:
        raise _is_locked(folder)


def _is_locked(folder: AnyPath) -> InputError:
    return InputError(
        f"another process is training in {folder}: wait for it, or choose another training.out"
    )


def _check_shared(folder: AnyPath, mark: str) -> None:
    """Waits until the lock file on this host contains the `mark` that host 0 wrote."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while read_many(folder, [_MARK])[_MARK] != mark.encode():
        if time.monotonic() > deadline:
            raise InputError(
                f"the run folder {folder.absolute()} is not that of host 0: training.out must be on"
                " storage that all hosts share, with the same path on all"
            )
        time.sleep(0.2)
