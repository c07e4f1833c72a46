"""Worker processes that encode a corpus, and exit when this process does."""

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


# Whether this worker runs a task. It is cleared, and read before an exit, under the lock.
_running = threading.Event()
_state_lock = threading.Lock()


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yields a pool whose workers exit when this process exits, and soon after an error.

    Its tasks must be submitted by `submit`. Each worker watches a pipe. Only this process has the
    pipe's other end, which the system closes when this process exits.
    """
    # Not fork: forking a process in which JAX runs threads can deadlock.
    context = multiprocessing.get_context("spawn")
    worker_end, parent_end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _watch_parent, (worker_end, os.getpid()))
    try:
        yield pool
        pool.shutdown()
    finally:
        parent_end.close()
        pool.shutdown(cancel_futures=True)
        worker_end.close()


def submit(pool: ProcessPoolExecutor, function: Callable[..., R], *args: Any) -> "Future[R]":
    """Submits a task to a pool of `worker_pool`; an error in this process ends it at once."""
    return pool.submit(_run_task, function, *args)


def _run_task(function: Callable[..., R], *args: Any) -> R:
    _running.set()
    try:
        return function(*args)
    finally:
        with _state_lock:
            _running.clear()


def _watch_parent(pipe: Connection, parent: int) -> None:
    """Makes this worker exit when the pipe's other end closes, also in the middle of a task.

    A worker that exits while it sends a result would leave the parent waiting for the rest of it:
    as long as the parent runs, a worker exits only during a task. Between tasks the pool ends it.
    """
    # Ctrl-C sends SIGINT to all processes of a terminal: only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            pipe.recv_bytes()
        while True:
            with _state_lock:
                if _running.is_set() or os.getppid() != parent:
                    os._exit(1)
            time.sleep(0.01)

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
            running.append(submit(pool, function, task))
            if len(running) > 3 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
