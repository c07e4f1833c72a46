"""The handshake: the hosts of a run connect to host 0, count each other, and authenticate.

It comes before JAX joins the hosts, because JAX aborts with a stack trace when a host is missing or
miscounted, and accepts any host. Four messages on each connection, all but the last small:

    host i → host 0    hello      nonce
    host 0 → host i    challenge  another nonce, proof of host 0
    host i → host 0    join       number, number of hosts, name, proof of host i
    host 0 → host i    accepted; when all have joined: start, or refused with the reason

A proof is the HMAC-SHA256 of both nonces and the content, with the job token as the key (`hosts`
chooses the token). Host 0 serves all connections at the same time. Until its proof, a connection
has PROOF_SECONDS in all, and UNPROVEN_LINE_BYTES for a line. Host 0 closes a connection that breaks
a rule, without an answer.
"""

import hashlib
import hmac
import json
import secrets
import selectors
import socket
import time
from dataclasses import dataclass
from typing import Any

from llama_jax.errors import InputError
from llama_jax.runtime.connection import MESSAGE_BYTES, SEND_SECONDS, Connection
from llama_jax.runtime.control_channel import ControlChannel, log

JOIN_SECONDS = 300.0  # time for the slowest host to start
GRACE_SECONDS = 5.0  # after a mistake: hosts that connect in this time get the message too
PROOF_SECONDS = 10.0  # from a connection to its proof
UNPROVEN_LINE_BYTES = 1024  # longest line before the proof
# Connections without a proof that may be open at the same time, in addition to one for each host.
# When there are more, host 0 closes the oldest; if it was a host's, that host connects again.
SPARE_CANDIDATES = 64
RETRY_SECONDS = 0.1  # between two attempts to connect


def connect_hosts(
    host: str, port: int, processes: int, process: int, token: bytes
) -> tuple[ControlChannel, int]:
    """Returns the control channel of all hosts, and a free port of host 0 for JAX.

    Args:
        host: address of host 0, as the others reach it.
        port: on which host 0 listens.
        processes: number of processes in all.
        process: number of this process.
        token: secret of the run, or b"".

    Raises:
        InputError: a host is missing or miscounted, or has another token.
    """
    if process:
        connection, names, jax_port = _join(host, port, processes, process, token)
        return ControlChannel(process, names, {0: connection}), jax_port
    acceptor = _Acceptor(port, processes, token)
    acceptor.wait_for_all()
    names = [acceptor.names[i] for i in range(processes)]
    with socket.create_server(("", 0)) as free:
        jax_port = free.getsockname()[1]
    for connection in acceptor.joined.values():
        connection.send("start", [names, jax_port])
    return ControlChannel(process, names, acceptor.joined), jax_port


def wait_until_reachable(host: str, port: int) -> None:
    """Waits until host 0 listens for JAX's clients, which retry only once a second.

    Raises:
        InputError: `JOIN_SECONDS` have passed.
    """
    advice = "the network must let the hosts reach all ports of host 0"
    _connect(host, port, time.monotonic() + JOIN_SECONDS, advice).socket.close()


def _proof(token: bytes, *content: Any) -> str:
    return hmac.new(token, json.dumps(content).encode(), hashlib.sha256).hexdigest()


def _equal(proof: str, expected: str) -> bool:
    return hmac.compare_digest(proof.encode(errors="replace"), expected.encode())


def _join(
    host: str, port: int, processes: int, process: int, token: bytes
) -> tuple[Connection, list[str], int]:
    """Joins the run at host 0; returns the connection, the names of all hosts, and JAX's port."""
    coordinator = f"host 0 at {host}:{port}"
    no_answer = (
        f"{coordinator} does not answer as host 0 of this run: see its output, and check whether"
        " another program uses the port"
    )
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        connection = _connect(host, port, deadline)
        try:
            if not _authenticate(connection, coordinator, processes, process, token, deadline):
                raise InputError(no_answer)
            return connection, *_wait_for_start(connection, coordinator, processes)
        except ConnectionError:  # host 0 had too many connections, or has just exited
            connection.socket.close()
            if time.monotonic() > deadline:
                raise InputError(no_answer) from None
            time.sleep(RETRY_SECONDS)
        except TimeoutError:
            connection.socket.close()
            raise InputError(no_answer) from None
        except BaseException:
            connection.socket.close()
            raise


def _authenticate(
    connection: Connection,
    coordinator: str,
    processes: int,
    process: int,
    token: bytes,
    deadline: float,
) -> bool:
    """Exchanges proofs with host 0; returns whether host 0 has accepted this host."""
    nonce, own = secrets.token_hex(16), [process, processes, socket.gethostname()]
    connection.send("hello", nonce)
    match connection.wait(deadline):
        case "challenge", [str(challenge), str(proof)]:
            # Host 0 gets this host's proof even if its own is wrong: then both print the reason.
            connection.send("join", [*own, _proof(token, "host", nonce, challenge, *own)])
            if not _equal(proof, _proof(token, "host 0", nonce, challenge)):
                raise InputError(
                    f"{coordinator} belongs to another run, or has another job token: set the same"
                    " LLAMA_JAX_JOB_TOKEN on all hosts of a run, or on none"
                )
            return connection.wait(deadline) == ("accepted", None)
    return False


def _wait_for_start(
    connection: Connection, coordinator: str, processes: int
) -> tuple[list[str], int]:
    """Waits until all hosts have joined; returns their names and the port for JAX."""
    try:
        match connection.wait(time.monotonic() + JOIN_SECONDS + 2 * GRACE_SECONDS):
            case "start", [[*names], int(jax_port)] if len(names) == processes and all(
                isinstance(name, str) for name in names
            ):
                return names, jax_port
            case "refused", str(reason):
                raise InputError(reason)
    except (ConnectionError, TimeoutError):
        pass
    raise InputError(f"{coordinator} exited before all hosts had joined: see its output")


def _connect(
    host: str, port: int, deadline: float, advice: str = "start it, or correct the address"
) -> Connection:
    while True:
        try:
            return Connection(socket.create_connection((host, port), timeout=10))
        except OSError as error:  # its name may not resolve yet, its process not run yet
            if time.monotonic() > deadline:
                raise InputError(
                    f"can't reach host 0 at {host}:{port} within {JOIN_SECONDS:.0f} s"
                    f" ({error.strerror or error}): {advice}"
                ) from error
        time.sleep(RETRY_SECONDS)


@dataclass(eq=False)
class _Candidate:
    """A connection that has not yet proven that it comes from a host of this run."""

    connection: Connection
    address: str
    deadline: float
    nonces: tuple[str, str] | None = None  # the candidate's, and that of host 0


class _Acceptor:
    """Accepts the other hosts on host 0. One thread serves all connections and waits for none."""

    def __init__(self, port: int, processes: int, token: bytes):
        self.port, self.processes, self.token = port, processes, token
        self.names = {0: socket.gethostname()}
        self.joined: dict[int, Connection] = {}
        self._refused: list[Connection] = []
        self._mistake = ""
        self._candidates: dict[_Candidate, None] = {}  # the oldest first
        self._reported: set[str] = set()
        self._selector = selectors.DefaultSelector()
        self._deadline = time.monotonic() + JOIN_SECONDS

    def wait_for_all(self) -> None:
        """Fills `joined` with a connection to each other host, and `names`.

        Raises:
            InputError: hosts are missing or miscounted. The joined hosts get the same message.
        """
        with _listen(self.port) as server, self._selector:
            self._selector.register(server, selectors.EVENT_READ)
            while len(self.joined) < self.processes - 1:
                now = time.monotonic()
                if now >= self._deadline:
                    break
                for key, _ in self._selector.select(self._drop_overdue(now) - now):
                    if key.fileobj is server:
                        self._accept(server)
                    elif isinstance(key.data, int):
                        self._remove_if_closed(key.data)
                    elif key.data in self._candidates:  # it may have been dropped just now
                        self._answer(key.data)
            for candidate in self._candidates:
                candidate.connection.socket.close()
        missing = [str(i) for i in range(self.processes) if i not in self.names]
        if missing and not self._mistake:
            self._mistake = (
                f"only {len(self.names)} of {self.processes} hosts joined within"
                f" {JOIN_SECONDS:.0f} s: start {', '.join(missing[:20])} too, or check why they"
                f" can't reach port {self.port} of this host"
            )
        if self._mistake:
            for connection in [*self.joined.values(), *self._refused]:
                connection.send("refused", self._mistake)
                connection.socket.close()
            raise InputError(self._mistake)

    def _drop_overdue(self, now: float) -> float:
        """Drops candidates past their deadline; returns the next deadline."""
        while self._candidates:
            oldest = next(iter(self._candidates))
            if oldest.deadline > now:
                return min(oldest.deadline, self._deadline)
            self._drop(oldest)
        return self._deadline

    def _accept(self, server: socket.socket) -> None:
        try:
            accepted, address = server.accept()
        except (BlockingIOError, ConnectionError):  # the other end has closed already
            return
        except OSError:  # too many open files
            if not self._candidates:
                raise
            self._forget(next(iter(self._candidates)))
            return
        connection = Connection(accepted, UNPROVEN_LINE_BYTES)
        accepted.setblocking(False)
        address = address[0].removeprefix("::ffff:")
        candidate = _Candidate(connection, address, time.monotonic() + PROOF_SECONDS)
        self._candidates[candidate] = None
        self._selector.register(accepted, selectors.EVENT_READ, candidate)
        if len(self._candidates) > self.processes + SPARE_CANDIDATES:
            self._forget(next(iter(self._candidates)))

    def _answer(self, candidate: _Candidate) -> None:
        """Answers the messages of a candidate."""
        connection = candidate.connection
        alive = connection.read()
        while connection.received:
            match connection.received.popleft():
                case "hello", str(nonce) if candidate.nonces is None:
                    candidate.nonces = nonce, secrets.token_hex(16)
                    proof = _proof(self.token, "host 0", *candidate.nonces)
                    connection.send("challenge", [candidate.nonces[1], proof])
                case "join", [int(process), int(theirs), str(name), str(proof)] if (
                    candidate.nonces and 0 <= process < theirs and name.isprintable()
                ):
                    own = _proof(self.token, "host", *candidate.nonces, process, theirs, name)
                    if _equal(proof, own):
                        self._admit(candidate, process, theirs, name)
                    else:
                        self._drop(candidate, "knows the protocol but not the job token")
                    return
                case _:
                    self._drop(candidate)
                    return
        if not alive:
            self._drop(candidate)

    def _admit(self, candidate: _Candidate, process: int, theirs: int, name: str) -> None:
        """Adds a host that has proven that it belongs to this run, or notes its mistake."""
        connection = candidate.connection
        self._forget(candidate, close=False)
        connection.limit = MESSAGE_BYTES
        connection.socket.settimeout(SEND_SECONDS)
        connection.send("accepted")
        if theirs != self.processes:
            mistake = (
                f"host {process} ({name}) was started with --processes {theirs}, host 0 with"
                f" {self.processes}: start all with the same number"
            )
        elif process in self.names:
            mistake = (
                f"two processes are both started as host {process} of {theirs}"
                f" ({self.names[process]} and {name}): number them from 0 to {theirs - 1}"
            )
        else:
            self.names[process], self.joined[process] = name, connection
            self._selector.register(connection.socket, selectors.EVENT_READ, process)
            return
        self._refused.append(connection)
        self._mistake = self._mistake or mistake
        self._deadline = min(self._deadline, time.monotonic() + GRACE_SECONDS)

    def _remove_if_closed(self, process: int) -> None:
        """Removes a host that has exited while it waited: it may be started again."""
        connection = self.joined[process]
        if not connection.read():
            self._selector.unregister(connection.socket)
            connection.socket.close()
            del self.joined[process], self.names[process]

    def _drop(
        self, candidate: _Candidate, reason: str = "does not behave as a host of this run"
    ) -> None:
        self._forget(candidate)
        if reason not in self._reported:
            self._reported.add(reason)
            log(
                f"dropped a connection from {candidate.address} to port {self.port}, which"
                f" {reason}; the next ones are dropped without a message"
            )

    def _forget(self, candidate: _Candidate, close: bool = True) -> None:
        self._selector.unregister(candidate.connection.socket)
        del self._candidates[candidate]
        if close:
            candidate.connection.socket.close()


def _listen(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=4096)
    except OSError as error:
        raise InputError(
            f"can't listen for the other hosts on port {port} ({error.strerror}): does another run"
            " use the port, or is this not host 0?"
        ) from error
    server.setblocking(False)
    return server
