"""Work on many tensors with little memory: some at once, in order, and never more than a budget."""

import ctypes
import os
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from llama_jax.errors import InputError

_SYNC_SECONDS = 0.5
_SYNC_THREADS = 8
_M_MMAP_THRESHOLD = -3  # malloc.h
_CGROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")

Item = TypeVar("Item")
Made = TypeVar("Made")


def in_order(
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
def byte_progress(title: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Shows bytes, rate and time left on standard error; calling what it gives adds bytes.

    A bar on a terminal, a line every ten seconds elsewhere.
    """
    console = Console(stderr=True)
    if shown and not console.is_terminal:
        yield _lines(title, total)
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn(title), *columns, console=console, disable=not shown, transient=True
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda n: bar.advance(task, n)


def _lines(title: str, total: int) -> Callable[[int], None]:
    begun = told = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, told
        done += n
        now = time.monotonic()
        if now - told > 10:
            told, rate = now, done / (now - begun)
            print(
                f"{title}  {done / 1e9:.1f} of {total / 1e9:.1f} GB  {rate / 1e6:.0f} MB/s"
                f"  {(total - done) / rate:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    return advance


@contextmanager
def synced(folder: Path) -> Iterator[None]:
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


def give_freed_memory_back() -> None:
    """Makes glibc map every large array by itself, so that it leaves the process when it is freed.

    Otherwise each thread keeps what it freed up to 32 MiB at a time, beyond any limit.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def resident() -> int:
    """Returns the memory that this process holds now [bytes]."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    return peak_resident()


def check_memory(nbytes: int, what: str) -> None:
    """Checks that this process can hold so many more bytes.

    Raises:
        InputError: the machine, or the limit of a container, has no room for `what`.
    """
    has = available_memory()
    if nbytes > has:
        raise InputError(
            f"{what} takes {nbytes / 2**30:,.2f} GiB of memory, but {has / 2**30:,.2f} GiB are"
            " free: make room, or take a machine with more"
        )


def available_memory(root: Path = Path("/")) -> int:
    """Returns how many more bytes this process can hold.

    On Linux the machine's free memory, or what its cgroup's limit leaves if that is less; what
    files take as a cache counts as free. Elsewhere all memory of the machine.

    Args:
        root: folder that holds `proc` and `sys`.
    """
    if sys.platform != "linux":
        return os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    meminfo = (root / "proc/meminfo").read_text()
    free = [int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024]
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        names = ("memory.max", "memory.current") if not controllers else _CGROUP_1
        place = root / ("sys/fs/cgroup" if not controllers else "sys/fs/cgroup/memory")
        if controllers in ("", "memory"):
            group = place / name.lstrip("/")
            free += [_left(g, *names) for g in (group, *group.parents) if g.is_relative_to(place)]
    return max(0, min(free))


def _left(group: Path, limit: str, usage: str) -> int:
    """Returns the bytes that the limit of a cgroup leaves."""
    try:
        most = int((group / limit).read_text())  # or 'max', which is no number
        used = int((group / usage).read_text())
        lines = map(str.split, (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # there is no such limit, or no such file
        return sys.maxsize
    stat = {name: int(value) for name, value in lines}
    cache = sum(stat.get(f"total_{n}", stat.get(n, 0)) for n in ("inactive_file", "active_file"))
    return most - used + cache


def peak_resident() -> int:
    """Returns the most memory that this process has held so far [bytes]."""
    if sys.platform == "linux":  # getrusage also counts what the process before exec had held
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
