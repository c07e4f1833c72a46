"""Worker processes that encode a corpus, and exit when this process does."""

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yields a pool whose workers exit when this process exits, and at once after an error.

    Each worker watches a pipe. Only this process has the pipe's other end, which the system closes
    when this process exits.
    """
    # Not fork: forking a process in which JAX runs threads can deadlock.
    context = multiprocessing.get_context("spawn")
    worker_end, parent_end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _exit_with_parent, (worker_end,))
    try:
        yield pool
        pool.shutdown()
    finally:
        parent_end.close()
        pool.shutdown(cancel_futures=True)
        worker_end.close()


def _exit_with_parent(pipe: Connection) -> None:
    """Makes this worker exit when the pipe's other end closes, also in the middle of a task."""
    # Ctrl-C sends SIGINT to all processes of a terminal: only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            pipe.recv_bytes()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def map_in_order(
    function: Callable[[T], R], tasks: Iterable[T], workers: int
) -> Generator[R, None, None]:
    """Yields the results of `function` for all tasks in order, with few tasks in memory.

    Args:
        function: can be pickled, if there are several workers.
        tasks: are read while the first of them run.
        workers: number of processes; 1 runs the tasks in this process.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    with worker_pool(workers) as pool:
        running = collections.deque[Future[R]]()
        for task in tasks:
            running.append(pool.submit(function, task))
            if len(running) > 3 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
