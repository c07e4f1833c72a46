"""Joins the hosts of a pod or cluster for one training run, and ends them together."""

import contextlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax._src.clusters import ClusterEnv  # what `jax.distributed.initialize` itself asks

from llama_jax.errors import Fault, InputError
from llama_jax.runtime import handshake, stop_signal
from llama_jax.runtime.control_channel import ControlChannel

# An unexpected exception is usually caused by another host dying, when a collective breaks. Wait
# this long so that the root cause is reported first.
ROOT_CAUSE_SECONDS = 2.0
# A process without a heartbeat for so long is hung; JAX then ends the others. Its heartbeats come
# from a thread that a busy machine may not run for a while.
HEARTBEAT_SECONDS = 100
JOB_TOKEN = "LLAMA_JAX_JOB_TOKEN"

Decision = TypeVar("Decision")

_channel: ControlChannel | None = None


@contextlib.contextmanager
def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Iterator[None]:
    """Joins all processes of a run for the time of the block. A single process has none to join.

    TPU pods, SLURM, Open MPI and indexed Jobs of Kubernetes tell which processes belong together;
    elsewhere the three arguments do. When one process dies or raises in the block, all print the
    root cause and exit: with 2 after an InputError, else with 1.

    Processes join only those that have the same job token: LLAMA_JAX_JOB_TOKEN, or else what the
    scheduler calls the job.

    Args:
        coordinator: 'host:port' of process 0, as the others reach it.
        processes: number of processes in all.
        process: number of this one, from 0.

    Raises:
        InputError: the processes can't meet, or disagree about their number or the job token.
    """
    global _channel
    place = _named(coordinator, processes, process) or _detected()
    if place is None or place[1] == 1:
        yield
        return
    address, processes, process = place
    token = _job_token(address, detected=coordinator is None)
    _channel, port = handshake.meet(*_split(address), processes, process, token)
    channel = _channel
    stop_signal.exit_run = lambda message: channel.fail(message, 0)
    try:
        _join_jax(f"{address.rpartition(':')[0]}:{port}", processes, process, coordinator is None)
        yield
        check_equal_on_hosts({})  # no host leaves before all are done
        _channel.leaving = True
        jax.distributed.shutdown()
    except InputError as error:
        _channel.fail(str(error), 2)
    except stop_signal.SigtermReceived as stopped:
        _channel.fail(str(stopped), 0)
    except KeyboardInterrupt:
        _channel.fail("interrupted", 130)
    except BaseException as error:
        time.sleep(ROOT_CAUSE_SECONDS)
        if isinstance(error, Fault):
            _channel.fail(str(error), 1)
        traceback.print_exception(error)
        _channel.fail(f"{type(error).__name__}: {_first_line(error)}", 1)
    _channel.close()
    _channel = None


def is_multi_host() -> bool:
    """Tells whether this process is one of several."""
    return _channel is not None


def is_host_zero() -> bool:
    """Tells whether this process is host 0, which alone prints and writes files."""
    return _channel is None or _channel.process == 0


def broadcast_decision(decide: Callable[[], Decision]) -> Decision:
    """Returns what `decide` returns on host 0 (plain JSON); the others wait for it.

    Its error ends all hosts.
    """
    if _channel is None:
        return decide()
    if _channel.process:
        return _channel.decisions.get()
    decision = decide()
    _channel.to_others("decision", decision)
    return decision


def check_equal_on_hosts(values: dict[str, Any]) -> None:
    """Waits for all hosts, which must hold the same `values` (plain JSON).

    Raises:
        InputError: names the first value that differs, and where.
    """
    if _channel is None:
        return
    if _channel.process:
        _channel.to_coordinator("values", values)
    for host, received in _channel.values.items() if is_host_zero() else ():
        theirs, ours = received.get(), json.loads(json.dumps(values))
        for name in ours:
            if theirs.get(name) != ours[name]:
                raise InputError(
                    f"{name} is {ours[name]} on host 0, but {theirs.get(name)} on"
                    f" {_channel.name(host)}: start all hosts with the same"
                )
    broadcast_decision(lambda: None)


def stop_before(step: int, wanted: str | None) -> str | None:
    """Returns why to stop before `step`, the same step on all hosts; None: dispatch it.

    All hosts call this before they dispatch a step. `wanted` is this host's reason to stop; when
    any host has one, all stop before the next step or the one after that. It costs a lock, no
    collective. JAX's `reached_preemption_sync_point` does the same for SIGTERM alone, and can't
    say which host wants to stop and why.
    """
    return wanted if _channel is None else _channel.stop_before(step, wanted)


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
                address = kind.get_coordinator_address(int(handshake.JOIN_SECONDS), port)
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


def _job_token(address: str, detected: bool) -> bytes:
    """Returns what all processes of this run have in common, and others should not have.

    Only LLAMA_JAX_JOB_TOKEN is a secret. The scheduler's name of the job keeps out hosts of other
    jobs that connect by accident; anybody can guess it. Flags name only host 0, perhaps differently
    on each host: they give no token.
    """
    token = os.environ.get(JOB_TOKEN)
    if token is not None and len(token) < 16:
        raise InputError(
            f"{JOB_TOKEN} has {len(token)} characters: set it on all hosts to the same secret of 16"
            " or more (`openssl rand -hex 32` makes one), or unset it"
        )
    if token is not None:
        return token.encode()
    if not detected:
        return b""
    # `mpirun` starts some processes in a step of SLURM and some outside.
    slurm = () if "OMPI_MCA_orte_hnp_uri" in os.environ else ("SLURM_JOB_ID", "SLURM_STEP_ID")
    return " ".join([address, *(os.environ.get(name, "") for name in slurm)]).encode()


def _join_jax(address: str, processes: int, process: int, detected: bool) -> None:
    # JAX's preemption service would take SIGTERM from the training loop, which saves and stops on
    # it (see `stop_before`).
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        address,
        processes,
        process,
        # SLURM and Open MPI start a process for each GPU; JAX then learns which one is its own.
        cluster_detection_method=None if detected else "deactivate",
        initialization_timeout=int(handshake.JOIN_SECONDS),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
