"""Joins the hosts of a pod or cluster for one run, and ends them together."""

import contextlib
import json
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src.clusters import ClusterEnv  # `jax.distributed.initialize` uses it too
from jax.experimental import multihost_utils

from llama_jax.errors import Fault, InputError
from llama_jax.runtime import handshake, stop_signal
from llama_jax.runtime.control_channel import ControlChannel

# An unexpected exception is usually caused by another host dying, when a collective breaks. Wait
# this long so that the root cause is reported first.
ROOT_CAUSE_SECONDS = 2.0
# JAX counts a process without a heartbeat for this long as hung, and ends the others. Heartbeats
# come from a thread that may not run for a while on a busy machine. If host 0 is stopped, the
# others abort after half of it at the earliest: the watchdog must have named host 0 before.
HEARTBEAT_SECONDS = 150
JOB_TOKEN = "LLAMA_JAX_JOB_TOKEN"

Decision = TypeVar("Decision")

_channel: ControlChannel | None = None


@contextlib.contextmanager
def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Iterator[None]:
    """Joins all processes of a run during the block; does nothing for a single process.

    On TPU pods, SLURM, Open MPI and indexed Jobs of Kubernetes the environment states which
    processes belong together; elsewhere the three arguments do. When one process dies or raises in
    the block, all print the root cause and exit: with 2 after an InputError, else with 1.

    Only processes with the same job token join each other: LLAMA_JAX_JOB_TOKEN, or the scheduler's
    name of the job.

    Args:
        coordinator: 'host:port' of process 0, as the others reach it.
        processes: number of processes in all.
        process: number of this process, from 0.

    Raises:
        InputError: the processes can't connect, or disagree about their number or the job token.
    """
    global _channel
    cluster = _cluster_from_flags(coordinator, processes, process) or _detect_cluster()
    if cluster is None or cluster[1] == 1:
        yield
        return
    address, processes, process = cluster
    token = _job_token(address, detected=coordinator is None)
    _channel, port = handshake.connect_hosts(*_split_address(address), processes, process, token)
    channel = _channel
    stop_signal.exit_run = lambda message: channel.fail(message, 0)
    try:
        _join_jax(f"{address.rpartition(':')[0]}:{port}", processes, process, coordinator is None)
        yield
        check_equal_on_hosts({})  # a barrier: no host leaves before all are done
        _channel.leaving = True
        jax.distributed.shutdown()
    except BaseException as error:
        fail(error)
    _channel.close()
    _channel = None


def fail(error: BaseException) -> NoReturn:
    """Ends all hosts with an error of this one.

    `join` calls this for an error in its block. A thread must call it itself.

    Raises:
        BaseException: `error`, on a single host.
    """
    if _channel is None:
        raise error
    match error:
        case InputError():
            _channel.fail(str(error), 2)
        case stop_signal.SigtermReceived():
            _channel.fail(str(error), 0)
        case KeyboardInterrupt():
            _channel.fail("interrupted", 130)
    time.sleep(ROOT_CAUSE_SECONDS)
    if isinstance(error, Fault):
        _channel.fail(str(error), 1)
    traceback.print_exception(error)
    _channel.fail(f"{type(error).__name__}: {_first_line(error)}", 1)


def is_multi_host() -> bool:
    """Returns whether this process is one of several."""
    return _channel is not None


def is_host_zero() -> bool:
    """Returns whether this process is host 0, the only one that prints and writes files."""
    return _channel is None or _channel.process == 0


def count() -> int:
    """Returns the number of hosts."""
    return 1 if _channel is None else len(_channel.names)


def number() -> int:
    """Returns the number of this host, from 0."""
    return 0 if _channel is None else _channel.process


def gather(value: Any) -> list[Any]:
    """Returns the values (plain JSON) of all hosts, in their order. All hosts must call it."""
    if _channel is None:
        return [value]
    if _channel.process:
        _channel.to_coordinator("values", {"": value})
    received = [values for _, values in sorted(_channel.values.items())]
    return broadcast_decision(lambda: [value, *(values.get()[""] for values in received)])


def name(host: int) -> str:
    """Returns 'host 2 (node17)'."""
    return f"host {host} ({_channel.names[host] if _channel else socket.gethostname()})"


def send_report(content: list[Any]) -> None:
    """Sends plain JSON to host 0, and waits for nothing. `take_reports` returns it there."""
    if _channel is not None:
        _channel.to_coordinator("report", content)


def take_reports() -> list[tuple[int, list[Any]]]:
    """Returns the reports that have arrived on host 0 since the last call: host, content."""
    reports = []
    while _channel is not None and not _channel.reports.empty():
        reports.append(_channel.reports.get())
    return reports


def channel() -> ControlChannel | None:
    """Returns the control channel; None on a single host."""
    return _channel


def broadcast_decision(decide: Callable[[], Decision]) -> Decision:
    """Calls `decide` on host 0 and returns its result (plain JSON) on all hosts.

    An error in `decide` ends all hosts.
    """
    if _channel is None:
        return decide()
    if _channel.process:
        return _channel.decisions.get()
    decision = decide()
    _channel.decide(decision)
    return decision


def broadcast_json(produce: Callable[[], Any]) -> Any:
    """As `broadcast_decision`, for a result of any size, which the devices' network carries.

    All hosts must use all of their devices in the collectives around this call.
    """
    if _channel is None:
        return produce()
    data = json.dumps(produce()).encode() if is_host_zero() else b""
    # The others wait for the size without a collective, which would end after a time-out.
    size = broadcast_decision(lambda: len(data))
    content = np.frombuffer(data.ljust(size, b"\0"), np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(content)))


def check_equal_on_hosts(values: dict[str, Any]) -> None:
    """Waits for all hosts, and checks that all pass the same `values` (plain JSON).

    Raises:
        InputError: a value differs; the message names the first one, and the host.
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
                    f" {_channel.name(host)}: start all hosts with the same value"
                )
    broadcast_decision(lambda: None)


def stop_before(step: int, reason: str | None) -> str | None:
    """Returns the reason to stop before `step`, the same step on all hosts, or None to dispatch it.

    All hosts call this before they dispatch a step. When any host passes a reason, all stop before
    the next step or the one after that. The call costs a lock and no collective. JAX's
    `reached_preemption_sync_point` does the same for SIGTERM only, and can't report which host
    stops and why.

    Args:
        step: the step that this host dispatches next.
        reason: of this host to stop, or None.
    """
    return reason if _channel is None else _channel.stop_before(step, reason)


def _cluster_from_flags(
    coordinator: str | None, processes: int | None, process: int | None
) -> tuple[str, int, int] | None:
    """Returns address, processes and process of the three flags, or None without flags."""
    if (coordinator, processes, process) == (None, None, None):
        return None
    if coordinator is None or processes is None or process is None:
        raise InputError("--coordinator, --processes and --process go together: give all three")
    if not 0 <= process < processes:
        raise InputError(
            f"--process {process} with --processes {processes}: number the processes from 0 to"
            f" {processes - 1}"
        )
    _split_address(coordinator)
    return coordinator, processes, process


def _split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InputError(f"--coordinator {address}: write HOST:PORT, as in 10.0.0.2:8476")
    return host.removeprefix("[").removesuffix("]"), int(port)


def process_in_cluster() -> tuple[int, int] | None:
    """Returns the number of this process in its cluster, from 0, and the number of processes.

    It joins none of them. None: the environment describes no cluster, or only one process.

    Raises:
        InputError: the environment can't be read.
    """
    try:
        if (kind := _cluster_kind()) and (processes := kind.get_process_count()) > 1:
            return kind.get_process_id(), processes
    except Exception as error:  # of a metadata server, of Kubernetes, of missing variables
        raise InputError(
            f"can't detect the processes of this cluster ({_first_line(error)}): give --task I/N"
        ) from error
    return None


def _cluster_kind() -> type[ClusterEnv] | None:
    """Returns JAX's class for the cluster that the environment describes."""
    # Any other pod of Kubernetes is a single process.
    indexed = "JOB_COMPLETION_INDEX" in os.environ
    for kind in ClusterEnv._cluster_types:
        if kind.opt_in_only_method or (kind.__name__ == "K8sCluster" and not indexed):
            continue
        if kind.is_env_present():
            return kind
    return None


def _detect_cluster() -> tuple[str, int, int] | None:
    """Returns address, processes and process of the cluster that the environment describes."""
    try:
        if kind := _cluster_kind():
            processes = kind.get_process_count()
            if processes == 1:
                return None
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = kind.get_coordinator_address(int(handshake.JOIN_SECONDS), port)
            return address, processes, kind.get_process_id()
    except Exception as error:  # of a metadata server, of Kubernetes, of missing variables
        raise InputError(
            f"can't detect the processes of this cluster ({_first_line(error)}): give"
            " --coordinator, --processes and --process"
        ) from error
    size = os.environ.get("OMPI_COMM_WORLD_SIZE", "1")
    if size != "1":
        raise InputError(
            f"this Open MPI started {size} processes, but gives no address of the first: add"
            " --coordinator HOST:PORT --processes $OMPI_COMM_WORLD_SIZE"
            " --process $OMPI_COMM_WORLD_RANK"
        )
    return None


def _job_token(address: str, detected: bool) -> bytes:
    """Returns the token that all processes of this run share, and others should not have.

    Only LLAMA_JAX_JOB_TOKEN is a secret. The scheduler's name of the job can be guessed: it only
    rejects hosts of other jobs that connect by accident. Flags give no token: they name host 0, and
    its name may differ from host to host.
    """
    token = os.environ.get(JOB_TOKEN)
    if token is not None and len(token) < 16:
        raise InputError(
            f"{JOB_TOKEN} has {len(token)} characters: set it on all hosts to the same secret of 16"
            " or more (`openssl rand -hex 32` generates one), or unset it"
        )
    if token is not None:
        return token.encode()
    if not detected:
        return b""
    # `mpirun` starts some processes inside a step of SLURM and some outside.
    slurm = () if "OMPI_MCA_orte_hnp_uri" in os.environ else ("SLURM_JOB_ID", "SLURM_STEP_ID")
    return " ".join([address, *(os.environ.get(name, "") for name in slurm)]).encode()


def _join_jax(address: str, processes: int, process: int, detected: bool) -> None:
    # JAX's preemption service would handle SIGTERM instead of the training loop, which saves and
    # stops (see `stop_before`).
    jax.config.update("jax_enable_preemption_service", False)
    if process:
        handshake.wait_until_reachable(*_split_address(address))
    jax.distributed.initialize(
        address,
        processes,
        process,
        # SLURM and Open MPI start one process for each GPU: detection tells JAX which GPU to use.
        cluster_detection_method=None if detected else "deactivate",
        initialization_timeout=int(handshake.JOIN_SECONDS),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
