"""Sides of a benchmark, each in a process of its own, which work in turn.

So a drift of the machine's speed meets all of them, and the threads of none wait for work while
another computes.
"""

import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

# Called in the side's process; returns what is done, and timed, again and again.
Maker = Callable[[], Callable[[], Any]]


def _work(make: Maker, asked: Connection) -> None:
    """Works whenever it is asked, and answers with its seconds, or what it returns of its own."""
    work = make()
    for _ in range(2):  # compile and warm up
        work()
    asked.send(None)
    while asked.recv():
        begun = time.perf_counter()
        told = work()
        asked.send(time.perf_counter() - begun if told is None else told)


def timed(sides: Mapping[str, Maker], rounds: int) -> dict[str, list[Any]]:
    """Returns the seconds of `rounds` rounds of each side, or what these return instead.

    Args:
        sides: by name; each is made in a process of its own, so it must be picklable.
        rounds: how often each works.
    """
    fresh = multiprocessing.get_context("spawn")
    told: dict[str, list[Any]] = {name: [] for name in sides}
    ends: dict[str, Connection] = {}
    workers = []
    for name, make in sides.items():
        ends[name], theirs = fresh.Pipe()
        workers.append(fresh.Process(target=_work, args=(make, theirs), daemon=True))
        workers[-1].start()
        theirs.close()  # so that a side that dies is noticed
        ends[name].recv()
    for _ in range(rounds):
        for name, end in ends.items():
            time.sleep(0.5)  # threads of the other sides come to rest
            end.send(True)
            told[name].append(end.recv())
    for end, worker in zip(ends.values(), workers, strict=True):
        end.send(False)
        worker.join()
    return told
