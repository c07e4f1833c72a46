"""Joins the hosts of a pod or cluster for one training run, and ends them together."""

import contextlib
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax._src.clusters import ClusterEnv  # what `jax.distributed.initialize` itself asks

from llama_jax import star, stop_signal
from llama_jax.errors import Fault, InputError

# An error that nobody foresaw is often the echo of a death elsewhere, a collective that breaks: for
# so long, what caused it has the word.
ECHO_SECONDS = 2.0

Decision = TypeVar("Decision")

_star: star.Star | None = None


@contextlib.contextmanager
def hosts(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Iterator[None]:
    """Joins all processes of a run for the time of the block; a process alone just goes on.

    TPU pods, SLURM, Open MPI and indexed Jobs of Kubernetes tell who belongs together; elsewhere
    the three arguments do. When one process dies or raises in the block, all print why and exit:
    with 2 after an InputError, else with 1.

    Args:
        coordinator: 'host:port' of process 0, as the others reach it.
        processes: number of processes in all.
        process: number of this one, from 0.

    Raises:
        InputError: the processes can't meet, or don't agree how many they are.
    """
    global _star
    place = _named(coordinator, processes, process) or _detected()
    if place is None or place[1] == 1:
        yield
        return
    address, processes, process = place
    meeting, port = star.meet(*_split(address), processes, process)
    _star = meeting
    stop_signal.end = lambda message: meeting.fail(message, 0)
    try:
        _join_jax(f"{address.rpartition(':')[0]}:{port}", processes, process, coordinator is None)
        yield
        agreed({})  # nobody leaves before all are done
        _star.leaving = True
        jax.distributed.shutdown()
    except InputError as error:
        _star.fail(str(error), 2)
    except stop_signal.Stopped as stopped:
        _star.fail(str(stopped), 0)
    except KeyboardInterrupt:
        _star.fail("interrupted", 130)
    except BaseException as error:
        time.sleep(ECHO_SECONDS)
        if isinstance(error, Fault):
            _star.fail(str(error), 1)
        traceback.print_exception(error)
        _star.fail(f"{type(error).__name__}: {_first_line(error)}", 1)
    _star.close()
    _star = None


def several() -> bool:
    """Tells whether this process is one of several."""
    return _star is not None


def leads() -> bool:
    """Tells whether this process is the first, which alone prints and writes files."""
    return _star is None or _star.process == 0


def decided(decide: Callable[[], Decision]) -> Decision:
    """Returns what `decide` returns on host 0 (plain JSON); the others wait for it.

    Its error ends all hosts.
    """
    if _star is None:
        return decide()
    if _star.process:
        return _star.decisions.get()
    decision = decide()
    _star.to_others("decision", decision)
    return decision


def agreed(values: dict[str, Any]) -> None:
    """Waits for all hosts, which must hold the same `values` (plain JSON).

    Raises:
        InputError: names the first value that differs, and where.
    """
    if _star is None:
        return
    if _star.process:
        _star.to_first("part", values)
    for host, parts in _star.parts.items() if leads() else ():
        theirs, ours = parts.get(), json.loads(json.dumps(values))
        for name in ours:
            if theirs.get(name) != ours[name]:
                raise InputError(
                    f"{name} is {ours[name]} on host 0, but {theirs.get(name)} on"
                    f" {_star.name(host)}: start all hosts with the same"
                )
    decided(lambda: None)


def stop_before(step: int, wanted: str | None) -> str | None:
    """Tells why to stop before `step` is handed to the device; None: go on.

    All hosts ask before each step. They are told so before the same one, the next or the one after
    that, when any of them has a reason that is `wanted`.
    """
    return wanted if _star is None else _star.stop_before(step, wanted)


def _named(
    coordinator: str | None, processes: int | None, process: int | None
) -> tuple[str, int, int] | None:
    """Returns what the three flags say: address, processes, process."""
    if (coordinator, processes, process) == (None, None, None):
        return None
    if coordinator is None or processes is None or process is None:
        raise InputError("--coordinator, --processes and --process go together: give all three")
    if not 0 <= process < processes:
        raise InputError(
            f"--process {process} with --processes {processes}: the numbers go from 0 to one less"
            " than there are processes"
        )
    _split(coordinator)
    return coordinator, processes, process


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InputError(f"--coordinator {address}: write HOST:PORT, as in 10.0.0.2:8476")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _detected() -> tuple[str, int, int] | None:
    """Returns what the environment says of a cluster: address, processes, process."""
    indexed = "JOB_COMPLETION_INDEX" in os.environ  # any other pod of Kubernetes is alone
    try:
        for kind in ClusterEnv._cluster_types:
            if kind.opt_in_only_method or (kind.__name__ == "K8sCluster" and not indexed):
                continue
            if kind.is_env_present():
                processes = kind.get_process_count()
                if processes == 1:
                    return None
                port = os.environ.get("JAX_COORDINATOR_PORT")
                address = kind.get_coordinator_address(int(star.JOIN_SECONDS), port)
                return address, processes, kind.get_process_id()
    except Exception as error:  # of a metadata server, of Kubernetes, of missing variables
        raise InputError(
            f"can't learn from this cluster who belongs together ({_first_line(error)}): say it"
            " with --coordinator, --processes and --process"
        ) from error
    size = os.environ.get("OMPI_COMM_WORLD_SIZE", "1")
    if size != "1":
        raise InputError(
            f"this Open MPI started {size} processes, but doesn't say where the first is: add"
            " --coordinator HOST:PORT --processes $OMPI_COMM_WORLD_SIZE"
            " --process $OMPI_COMM_WORLD_RANK"
        )
    return None


def _join_jax(address: str, processes: int, process: int, detected: bool) -> None:
    before = signal.getsignal(signal.SIGTERM)
    jax.distributed.initialize(
        address,
        processes,
        process,
        # SLURM and Open MPI start a process for each GPU; JAX then learns which one is its own.
        cluster_detection_method=None if detected else "deactivate",
        initialization_timeout=int(star.JOIN_SECONDS),
    )
    # JAX takes SIGTERM for a notice that it keeps for itself. Here the training loop hears it, and
    # before that it ends the process.
    signal.signal(signal.SIGTERM, before)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
