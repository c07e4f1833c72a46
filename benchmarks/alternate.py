"""Times the sides of a benchmark alternately, each in its own process.

Alternating exposes all sides to the same drift of the machine's speed. Threads of an idle side
don't compete with the side that computes.
"""

import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

# Called in the side's process; returns the function that is timed in each round.
Setup = Callable[[], Callable[[], Any]]


def _serve_rounds(setup: Setup, warm_up: int, requests: Connection) -> None:
    """Runs a round for each request; sends its seconds, or the round's own result if not None."""
    run_round = setup()
    for _ in range(warm_up):
        run_round()
    requests.send(None)
    while requests.recv():
        start = time.perf_counter()
        result = run_round()
        requests.send(time.perf_counter() - start if result is None else result)


def time_alternately(
    sides: Mapping[str, Setup], rounds: int, warm_up: int = 2
) -> dict[str, list[Any]]:
    """Returns the seconds of each round of each side, or the side's own results.

    Args:
        sides: setup function by name; must be picklable, as it runs in a new process.
        rounds: number of timed rounds of each side.
        warm_up: rounds before these, of each side; they compile.
    """
    spawn = multiprocessing.get_context("spawn")
    results: dict[str, list[Any]] = {name: [] for name in sides}
    connections: dict[str, Connection] = {}
    processes = []
    for name, setup in sides.items():
        connections[name], child = spawn.Pipe()
        processes.append(
            spawn.Process(target=_serve_rounds, args=(setup, warm_up, child), daemon=True)
        )
        processes[-1].start()
        child.close()  # the child's death then ends recv with EOFError
        connections[name].recv()
    for _ in range(rounds):
        for name, connection in connections.items():
            time.sleep(0.5)  # lets the threads of the other sides go idle
            connection.send(True)
            results[name].append(connection.recv())
    for connection, process in zip(connections.values(), processes, strict=True):
        connection.send(False)
        process.join()
    return results
