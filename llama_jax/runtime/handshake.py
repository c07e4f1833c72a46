"""The handshake: the hosts of a run find host 0, count each other, and prove that they belong here.

It comes before JAX joins the hosts, because JAX aborts with a stack trace where a host is missing
or miscounted, and lets anybody in. Four messages on each connection, all but the last small:

    host i → host 0    hello      nonce
    host 0 → host i    challenge  another nonce, proof of host 0
    host i → host 0    join       number, number of hosts, name, proof of host i
    host 0 → host i    accepted; when all have come: start, or refused with the reason

A proof is the HMAC-SHA256 of both nonces and the content under the job's token (`hosts` chooses
it). Host 0 serves all connections at the same time, and gives each GREETING_SECONDS in all and
GREETING_BYTES a line. Whoever breaks a rule is dropped without an answer.
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
from llama_jax.runtime.control_channel import (
    MESSAGE_BYTES,
    SEND_SECONDS,
    Connection,
    ControlChannel,
    log,
)

JOIN_SECONDS = 300.0  # for the slowest host to start
LATE_SECONDS = 5.0  # after a mistake, in which hosts that come later learn of it too
GREETING_SECONDS = 10.0  # from a connection to its proof
GREETING_BYTES = 1024  # of a line before the proof
# Connections without a proof that are open at the same time, beside one for each host. When more
# come, the oldest is closed; a host that this hits connects again.
STRANGERS = 64
RETRY_SECONDS = 0.2


def meet(
    host: str, port: int, processes: int, process: int, token: bytes
) -> tuple[ControlChannel, int]:
    """Returns the control channel of all hosts, and a free port of host 0 for JAX.

    Args:
        host: where host 0 runs, as the others reach it.
        port: where it waits for them.
        processes: number of processes in all.
        process: number of this one.
        token: what the processes of this run share.

    Raises:
        InputError: they don't all come, or not as they should.
    """
    if process:
        connection, names, jax_port = _join(host, port, processes, process, token)
        return ControlChannel(process, names, {0: connection}), jax_port
    greeter = _Greeter(port, processes, token)
    greeter.wait_for_all()
    names = [greeter.names[i] for i in range(processes)]
    with socket.create_server(("", 0)) as free:
        jax_port = free.getsockname()[1]
    for connection in greeter.joined.values():
        connection.send("start", [names, jax_port])
    return ControlChannel(process, names, greeter.joined), jax_port


def _proof(token: bytes, *content: Any) -> str:
    return hmac.new(token, json.dumps(content).encode(), hashlib.sha256).hexdigest()


def _equal(proof: str, expected: str) -> bool:
    return hmac.compare_digest(proof.encode(errors="replace"), expected.encode())


def _join(
    host: str, port: int, processes: int, process: int, token: bytes
) -> tuple[Connection, list[str], int]:
    """Joins the run at host 0; returns the connection, the names of all hosts, and JAX's port."""
    where = f"host 0 at {host}:{port}"
    no_answer = (
        f"{where} does not answer as one of this run: look at its output, and whether another"
        " program uses the port"
    )
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        connection = _connect(host, port, deadline)
        try:
            if not _greet(connection, where, processes, process, token, deadline):
                raise InputError(no_answer)
            return connection, *_wait_for_start(connection, where, processes)
        except ConnectionError:  # host 0 had too many connections, or has just ended
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


def _greet(
    connection: Connection, where: str, processes: int, process: int, token: bytes, deadline: float
) -> bool:
    """Exchanges proofs with host 0, and tells whether it has accepted this host."""
    nonce, own = secrets.token_hex(16), [process, processes, socket.gethostname()]
    connection.send("hello", nonce)
    match connection.wait(deadline):
        case "challenge", [str(challenge), str(proof)]:
            # Host 0 gets this host's proof also where its own is wrong: both then say why.
            connection.send("join", [*own, _proof(token, "host", nonce, challenge, *own)])
            if not _equal(proof, _proof(token, "host 0", nonce, challenge)):
                raise InputError(
                    f"{where} belongs to another run, or has another job token: give all hosts of"
                    " a run the same LLAMA_JAX_JOB_TOKEN, or none to any"
                )
            return connection.wait(deadline) == ("accepted", None)
    return False


def _wait_for_start(connection: Connection, where: str, processes: int) -> tuple[list[str], int]:
    """Waits until all hosts have come; returns their names and the port for JAX."""
    try:
        match connection.wait(time.monotonic() + JOIN_SECONDS + 2 * LATE_SECONDS):
            case "start", [[*names], int(jax_port)] if len(names) == processes and all(
                isinstance(name, str) for name in names
            ):
                return names, jax_port
            case "refused", str(reason):
                raise InputError(reason)
    except (ConnectionError, TimeoutError):
        pass
    raise InputError(f"{where} has ended before all hosts had come: look at its output")


def _connect(host: str, port: int, deadline: float) -> Connection:
    while True:
        try:
            return Connection(socket.create_connection((host, port), timeout=10))
        except OSError as error:  # its name may not be known yet, its process not started
            if time.monotonic() > deadline:
                raise InputError(
                    f"can't reach host 0 at {host}:{port} within {JOIN_SECONDS:.0f} s"
                    f" ({error.strerror or error}): start it, or correct the address"
                ) from error
        time.sleep(RETRY_SECONDS)


@dataclass(eq=False)
class _Guest:
    """A connection that has not proven yet that it comes from a host of this run."""

    connection: Connection
    address: str
    deadline: float
    nonces: tuple[str, str] | None = None  # the guest's and ours


class _Greeter:
    """Host 0 while the others come. One thread serves all connections and waits for none."""

    def __init__(self, port: int, processes: int, token: bytes):
        self.port, self.processes, self.token = port, processes, token
        self.names = {0: socket.gethostname()}
        self.joined: dict[int, Connection] = {}
        self._refused: list[Connection] = []
        self._mistake = ""
        self._guests: dict[_Guest, None] = {}  # the oldest first
        self._reported: set[str] = set()
        self._selector = selectors.DefaultSelector()
        self._deadline = time.monotonic() + JOIN_SECONDS

    def wait_for_all(self) -> None:
        """Fills `joined` with a connection to each other host, and `names`.

        Raises:
            InputError: hosts are missing or miscounted. Those that came get the same sentence.
        """
        with _listen(self.port) as server, self._selector:
            self._selector.register(server, selectors.EVENT_READ)
            while len(self.joined) < self.processes - 1:
                now = time.monotonic()
                if now >= self._deadline:
                    break
                for key, _ in self._selector.select(self._drop_late(now) - now):
                    if key.fileobj is server:
                        self._accept(server)
                    elif isinstance(key.data, int):
                        self._notice_end(key.data)
                    elif key.data in self._guests:  # it may have been dropped just now
                        self._serve(key.data)
            for guest in self._guests:
                guest.connection.socket.close()
        missing = [str(i) for i in range(self.processes) if i not in self.names]
        if missing and not self._mistake:
            self._mistake = (
                f"of {self.processes} hosts {len(self.names)} have come within {JOIN_SECONDS:.0f}"
                f" s: start also {', '.join(missing[:20])}, or look why they can't reach port"
                f" {self.port} here"
            )
        if self._mistake:
            for connection in [*self.joined.values(), *self._refused]:
                connection.send("refused", self._mistake)
                connection.socket.close()
            raise InputError(self._mistake)

    def _drop_late(self, now: float) -> float:
        """Drops the guests whose time is over, and returns when something has to happen next."""
        while self._guests:
            oldest = next(iter(self._guests))
            if oldest.deadline > now:
                return min(oldest.deadline, self._deadline)
            self._drop(oldest)
        return self._deadline

    def _accept(self, server: socket.socket) -> None:
        try:
            accepted, address = server.accept()
        except (BlockingIOError, ConnectionError):  # the other end is gone again
            return
        except OSError:  # too many open files
            if not self._guests:
                raise
            self._forget(next(iter(self._guests)))
            return
        connection = Connection(accepted, GREETING_BYTES)
        accepted.setblocking(False)
        address = address[0].removeprefix("::ffff:")
        guest = _Guest(connection, address, time.monotonic() + GREETING_SECONDS)
        self._guests[guest] = None
        self._selector.register(accepted, selectors.EVENT_READ, guest)
        if len(self._guests) > self.processes + STRANGERS:
            self._forget(next(iter(self._guests)))

    def _serve(self, guest: _Guest) -> None:
        """Answers what a guest has sent."""
        connection = guest.connection
        alive = connection.read()
        while connection.received:
            match connection.received.popleft():
                case "hello", str(nonce) if guest.nonces is None:
                    guest.nonces = nonce, secrets.token_hex(16)
                    proof = _proof(self.token, "host 0", *guest.nonces)
                    connection.send("challenge", [guest.nonces[1], proof])
                case "join", [int(process), int(theirs), str(name), str(proof)] if (
                    guest.nonces and 0 <= process < theirs and name.isprintable()
                ):
                    own = _proof(self.token, "host", *guest.nonces, process, theirs, name)
                    if _equal(proof, own):
                        self._admit(guest, process, theirs, name)
                    else:
                        self._drop(guest, "knows the protocol but not the job token")
                    return
                case _:
                    self._drop(guest)
                    return
        if not alive:
            self._drop(guest)

    def _admit(self, guest: _Guest, process: int, theirs: int, name: str) -> None:
        """Takes in a host that has proven that it belongs to this run."""
        connection = guest.connection
        self._forget(guest, close=False)
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
                f"two processes say that they are host {process} of {theirs}"
                f" ({self.names[process]} and {name}): number them from 0 to {theirs - 1}"
            )
        else:
            self.names[process], self.joined[process] = name, connection
            self._selector.register(connection.socket, selectors.EVENT_READ, process)
            return
        self._refused.append(connection)
        self._mistake = self._mistake or mistake
        self._deadline = min(self._deadline, time.monotonic() + LATE_SECONDS)

    def _notice_end(self, process: int) -> None:
        """Forgets a host that has ended while it waited: it may be started again."""
        connection = self.joined[process]
        if not connection.read():
            self._selector.unregister(connection.socket)
            connection.socket.close()
            del self.joined[process], self.names[process]

    def _drop(self, guest: _Guest, why: str = "does not behave as a host of this run") -> None:
        self._forget(guest)
        if why not in self._reported:
            self._reported.add(why)
            log(
                f"dropped a connection from {guest.address} to port {self.port}, which {why}; the"
                " next ones are dropped without a word"
            )

    def _forget(self, guest: _Guest, close: bool = True) -> None:
        self._selector.unregister(guest.connection.socket)
        del self._guests[guest]
        if close:
            guest.connection.socket.close()


def _listen(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=4096)
    except OSError as error:
        raise InputError(
            f"can't wait for the other hosts at port {port} ({error.strerror}): does another run"
            " use it, or is this not host 0?"
        ) from error
    server.setblocking(False)
    return server
