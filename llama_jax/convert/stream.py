"""Work on many tensors with little memory: some at once, in order, and never more than a budget."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

_SYNC_SECONDS = 0.5
_SYNC_THREADS = 8
Item = TypeVar("Item")
Made = TypeVar("Made")


def map_in_order(
    items: Iterable[Item],
    work: Callable[[Item], Made],
    cost: Callable[[Item], int],
    budget: int,
) -> Iterator[Made]:
    """Yields work(item) of every item, in order, made by as many threads as there are cores.

    Args:
        items: what to work on.
        work: spends its time where Python lets other threads run (NumPy, hashing, files).
        cost: how much of the budget an item takes until its result is let go [bytes].
        budget: items are begun while all that are not let go cost no more than this, or alone.
    """
    waiting: deque[tuple[int, Future[Made]]] = deque()
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        try:
            taken = 0
            for item in items:
                price = cost(item)
                while waiting and (taken + price > budget or len(waiting) > workers):
                    first, future = waiting.popleft()
                    yield future.result()
                    taken -= first
                    del future
                waiting.append((price, pool.submit(work, item)))
                taken += price
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            for _, future in waiting:
                future.cancel()


@contextmanager
def sync_in_background(folder: Path) -> Iterator[None]:
    """Sends what is written into `folder` to the disk all the while, and waits for it at the end.

    Left to itself, a system begins to write late, and the work and the disk wait for each other.
    """
    ended = threading.Event()
    seen = dict[Path, tuple[int, int]]()  # what the disk has: size and time of the last change

    def sync() -> None:
        while not ended.wait(_SYNC_SECONDS):
            _sync_files(folder, seen)

    thread = threading.Thread(target=sync, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    _sync_files(folder, seen)


def _sync_files(folder: Path, seen: dict[Path, tuple[int, int]]) -> None:
    """Waits until the disk has the files in `folder`, except those that have not changed."""

    def sync(path: Path) -> None:
        with suppress(FileNotFoundError), open(path, "rb") as file:  # it may get its name just now
            about = os.fstat(file.fileno())
            state = (about.st_size, about.st_mtime_ns)
            if seen.get(path) != state:
                os.fsync(file.fileno())
                seen[path] = state

    with ThreadPoolExecutor(_SYNC_THREADS) as pool:  # a disk takes many small files at once
        files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
        list(pool.map(sync, files))  # unlike rglob, walk passes over a folder that is just removed
