"""Processes many tensors concurrently and in order, within a memory budget; syncs them to disk."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from llama_jax.runtime.bucket_path import BucketPath
from llama_jax.runtime.cpu import cpu_cores
from llama_jax.runtime.storage import AnyPath, upload_file

_SYNC_SECONDS = 0.5
_SYNC_THREADS = 8
Item = TypeVar("Item")
Result = TypeVar("Result")


def map_within_budget(
    items: Iterable[Item],
    work: Callable[[Item], Result],
    cost: Callable[[Item], int],
    budget: int,
) -> Iterator[Result]:
    """Yields work(item) for every item, in order, computed by one thread for each core.

    Args:
        items: the items.
        work: releases Python's lock for most of its time (NumPy, hashing, files).
        cost: memory of an item from its start until the caller drops its result [bytes].
        budget: an item starts if the cost of all unfinished items stays within this limit, or if
            no other item is unfinished [bytes].
    """
    pending: deque[tuple[int, Future[Result]]] = deque()
    workers = cpu_cores()
    with ThreadPoolExecutor(workers) as pool:
        try:
            used = 0
            for item in items:
                nbytes = cost(item)
                while pending and (used + nbytes > budget or len(pending) > workers):
                    oldest, future = pending.popleft()
                    yield future.result()
                    used -= oldest
                    del future  # otherwise its result would stay in memory
                pending.append((nbytes, pool.submit(work, item)))
                used += nbytes
            while pending:
                yield pending.popleft()[1].result()
        finally:
            for _, future in pending:
                future.cancel()


@contextmanager
def local_files(folder: AnyPath, needed: bool) -> Iterator[AnyPath]:
    """Yields the folder to write into: a local one if `folder` is in a bucket and files are needed.

    The files of Hugging Face and Meta can only be uploaded once they are complete.
    """
    if isinstance(folder, Path) or not needed:
        yield folder
        return
    with TemporaryDirectory(prefix="llama_jax-") as local:
        yield Path(local)
        for path in sorted(Path(local).iterdir()):
            upload_file(path, folder / path.name)


@contextmanager
def sync_in_background(folder: AnyPath) -> Iterator[None]:
    """Syncs the files in `folder` to the disk during the block, and waits for the rest at its end.

    Without this the system starts to write late, so that the work and the disk take turns.
    """
    if isinstance(folder, BucketPath):  # its requests end when the data is stored
        yield
        return
    ended = threading.Event()
    synced = dict[Path, tuple[int, int]]()  # path -> size and time of the last change

    def sync() -> None:
        while not ended.wait(_SYNC_SECONDS):
            _sync_files(folder, synced)

    thread = threading.Thread(target=sync, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    _sync_files(folder, synced)


def _sync_files(folder: Path, synced: dict[Path, tuple[int, int]]) -> None:
    """Syncs the files in `folder` that changed since they were `synced`."""

    def sync(path: Path) -> None:
        # Another thread may rename the file at this moment.
        with suppress(FileNotFoundError), open(path, "rb") as file:
            status = os.fstat(file.fileno())
            state = (status.st_size, status.st_mtime_ns)
            if synced.get(path) != state:
                os.fsync(file.fileno())
                synced[path] = state

    with ThreadPoolExecutor(_SYNC_THREADS) as pool:  # a disk writes many small files at once
        # os.walk, unlike Path.rglob, ignores a folder that is removed meanwhile.
        files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
        list(pool.map(sync, files))
