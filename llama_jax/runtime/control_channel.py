"""The control channel: one TCP connection from each host of a run to host 0, the coordinator.

It carries what JAX's collectives can't: the coordinator's decisions, the step to stop before, and
the first error, which ends all hosts. `handshake` opens it before JAX joins the hosts.

The end of a connection tells of a dead host. The kernel closes the connections of a killed process
at once, and keepalive probes find a host without power or network. No thread has to run in time
for that: a host that compiles or tokenizes for minutes on a busy machine never looks dead. A hung
process keeps its connection; JAX's heartbeat finds it.

Only hosts that passed the handshake are connected. Still, each message is bounded in size and its
shape is checked; a broken one is ignored with one line on standard error.
"""

import contextlib
import json
import os
import queue
import selectors
import socket
import sys
import threading
import time
import traceback
from collections import deque
from typing import Any, NoReturn

MESSAGE_BYTES = 1 << 20  # the largest message; names of 10,000 hosts take 0.7 MB
SEND_SECONDS = 5.0  # a host that reads nothing for so long counts as dead
SHUTDOWN_SECONDS = 5.0  # in which all processes end after an error
# Keepalive: a host that answers nothing for 10 + 4 × 5 seconds is gone. Longer than a network
# takes to find another way, and short beside the start of a run.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}


def log(sentence: str) -> None:
    """Prints a line on standard error; where that is closed, nothing happens."""
    with contextlib.suppress(OSError, ValueError):
        print(f"llama-jax: {sentence}", file=sys.stderr, flush=True)


class Connection:
    """A TCP connection that carries messages: a kind and plain JSON, one line each.

    Attributes:
        limit: longest line in bytes; longer ones count as broken and take no more memory.
        received: messages that have arrived, in order; None stands for a broken one.
    """

    def __init__(self, connection: socket.socket, limit: int = MESSAGE_BYTES):
        self.socket, self.limit = connection, limit
        self.received: deque[tuple[str, Any] | None] = deque()
        connection.settimeout(SEND_SECONDS)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option, value in _KEEPALIVE.items():
            if hasattr(socket, option):  # macOS lacks some
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._sending = threading.Lock()
        self._rest = b""

    def send(self, kind: str, content: Any = None) -> None:
        """Sends a message. A broken connection is closed, which its reader notices.

        Raises:
            ValueError: the message is larger than MESSAGE_BYTES.
        """
        line = json.dumps([kind, content]).encode()
        if len(line) > MESSAGE_BYTES:
            raise ValueError(f"a message of {len(line)} bytes to another host: {line[:80]!r} …")
        with self._sending:
            try:
                self.socket.sendall(line + b"\n")
            except OSError:  # half a line may be sent: the connection can't be used any more
                self.shut_down()

    def read(self) -> bool:
        """Adds the messages that have arrived to `received`; False: the other end is gone."""
        try:
            data = self.socket.recv(1 << 16)
        except (BlockingIOError, TimeoutError):
            return True
        except OSError:
            return False
        *lines, rest = (self._rest + data).split(b"\n")
        self.received += [self._parsed(line) for line in lines]
        if len(rest) > self.limit:
            self.received.append(None)
        self._rest = rest[: self.limit + 1]  # the byte too many marks the line as broken
        return bool(data)

    def _parsed(self, line: bytes) -> tuple[str, Any] | None:
        if len(line) > self.limit:
            return None
        try:
            match json.loads(line):
                case [str(kind), content]:
                    return kind, content
        except (ValueError, RecursionError):  # no JSON; deeper than Python reads
            pass
        return None

    def wait(self, deadline: float) -> tuple[str, Any] | None:
        """Waits for the next message, or None for a broken one, until `deadline` [monotonic].

        Raises:
            TimeoutError: no message came.
            ConnectionError: the other end is gone.
        """
        while not self.received:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.socket.settimeout(left)
            alive = self.read()
            self.socket.settimeout(SEND_SECONDS)
            if not alive and not self.received:
                raise ConnectionError
        return self.received.popleft()

    def shut_down(self) -> None:
        """Ends the connection for both ends; the socket stays to be closed."""
        with contextlib.suppress(OSError):  # the other end was faster
            self.socket.shutdown(socket.SHUT_RDWR)


class ControlChannel:
    """The hosts of a run, as one of them sees them.

    Attributes:
        process: number of this host.
        names: names of all hosts.
        connections: on host 0 one to each other host, elsewhere one to host 0.
        decisions: what host 0 has decided, in order.
        values: on host 0, what each other host has sent to be compared, in order.
        leaving: the run is over, and connections may end.
    """

    def __init__(self, process: int, names: list[str], connections: dict[int, Connection]):
        self.process, self.names, self.connections = process, names, connections
        self.decisions: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.values: dict[int, queue.SimpleQueue[dict[str, Any]]] = {
            i: queue.SimpleQueue() for i in connections
        }
        self.leaving = False
        self._shutting_down = threading.Lock()
        self._broken: set[int] = set()  # hosts that sent a broken message
        self._steps = threading.Condition()
        self._asked_before = -1  # the newest step that the main thread asked about
        self._requested = self._choosing = False
        self._answers: dict[int, int] | None = None
        self._reason = ""
        self._stop: tuple[int, str] | None = None
        self._reader = threading.Thread(target=self._read, daemon=True, name="control channel")
        self._reader.start()

    def name(self, process: int) -> str:
        """Returns 'host 2 (node17)'."""
        return f"host {process} ({self.names[process]})"

    def to_coordinator(self, kind: str, content: Any) -> None:
        """Sends a message to host 0, which may be this one."""
        if self.process == 0:
            self._handle(0, kind, content)
        else:
            self.connections[0].send(kind, content)

    def to_others(self, kind: str, content: Any) -> None:
        """Sends a message from host 0 to all others."""
        for connection in self.connections.values():
            connection.send(kind, content)

    def _to_all(self, kind: str, content: Any) -> None:
        self.to_others(kind, content)
        self._handle(0, kind, content)

    def _read(self) -> None:
        try:
            self._read_until_closed()
        except Exception as error:
            # Without this thread nobody would notice a dead host.
            traceback.print_exception(error)
            self.fail(f"{type(error).__name__}: {error}", 1)

    def _read_until_closed(self) -> None:
        selector = selectors.DefaultSelector()
        for process, connection in self.connections.items():
            selector.register(connection.socket, selectors.EVENT_READ, process)
            self._handle_received(process)  # messages that arrived together with the handshake's
        while selector.get_map():
            for key, _ in selector.select():
                alive = self.connections[key.data].read()
                self._handle_received(key.data)
                if alive:
                    continue
                selector.unregister(key.fileobj)
                if self.leaving:
                    self.connections[key.data].socket.close()
                else:
                    self._shut_down_all(
                        f"{self.name(key.data)} has died or can't be reached: look at its own"
                        " output, and start all again to go on from the last checkpoint",
                        1,
                    )

    def _handle_received(self, process: int) -> None:
        received = self.connections[process].received
        while received:
            self._handle(process, *(received.popleft() or ("broken", None)))

    def _handle(self, sender: int, kind: str, content: Any) -> None:
        """Does what a message from the host `sender` asks for."""
        match kind, content:
            case "decision", _ if sender == 0:
                self.decisions.put(content)
            case "values", dict():
                self.values[sender].put(content)
            case "error", [str(message), int(code)] if 0 <= code < 256:
                self._shut_down_all(message, code)
            case "shutdown", [str(message), int(code)] if sender == 0 and 0 <= code < 256:
                self._exit(message, code)
            case "stop request", str(reason):
                with self._steps:
                    if self._answers is None:
                        self._answers, self._reason = {}, reason
                        self._to_all("which step", None)
            case "which step", None if sender == 0:
                with self._steps:
                    self._choosing = True
                    self.to_coordinator("step", self._asked_before)
            case "step", int(step):
                with self._steps:
                    self._answer(sender, step)
            case "stop before", [int(step), str(reason)] if sender == 0:
                with self._steps:
                    self._stop, self._choosing = (step, reason), False
                    self._steps.notify_all()
            case _:
                if sender not in self._broken:
                    self._broken.add(sender)
                    log(
                        f"ignored a message of {self.name(sender)} that can't be read: do all hosts"
                        " run the same version?"
                    )

    # All hosts must stop before the same step: a host that has already dispatched a later step
    # would deadlock in its collectives. So host 0 asks each for its newest step. A host that has
    # answered dispatches nothing until the choice is known. The reader thread answers, so that a
    # host whose main thread waits for its device keeps nobody waiting.

    def stop_before(self, step: int, wanted: str | None) -> str | None:
        """Returns why to stop before `step`, the same step on all hosts; None: go on.

        `wanted` is this host's reason to stop.
        """
        if wanted and not self._requested:
            self._requested = True
            self.to_coordinator("stop request", f"{wanted} on {self.name(self.process)}")
        with self._steps:
            self._steps.wait_for(lambda: not self._choosing)
            self._asked_before = max(step, self._asked_before)
            return self._stop[1] if self._stop and step >= self._stop[0] else None

    def _answer(self, sender: int, step: int) -> None:
        if self._answers is not None and self._stop is None:
            self._answers[sender] = step
            if len(self._answers) == len(self.names):
                self._to_all("stop before", [max(self._answers.values()) + 1, self._reason])

    def fail(self, message: str, code: int) -> NoReturn:
        """Ends all hosts with the first error of any, which need not be this one."""
        message = f"{self.name(self.process)}: {message}"
        self.to_coordinator("error", [message, code])
        time.sleep(SHUTDOWN_SECONDS)  # host 0 says which error was the first
        self._exit(message, code)

    def _shut_down_all(self, message: str, code: int) -> NoReturn:
        self._shutting_down.acquire()  # never released: the first error is the one that all print
        try:
            if self.process == 0:
                self.to_others("shutdown", [message, code])
                # When this process exits, JAX aborts in all that are still there. Wait for them.
                deadline = time.monotonic() + SHUTDOWN_SECONDS
                for connection in self.connections.values():
                    with contextlib.suppress(TimeoutError, ConnectionError):
                        while True:
                            connection.wait(deadline)
        finally:
            self._exit(message, code)

    def _exit(self, message: str, code: int) -> NoReturn:
        log(message)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        # The main thread may wait in a collective that never ends, and JAX's own exit waits for
        # all hosts.
        os._exit(code)

    def close(self) -> None:
        """Ends the connections, once all hosts are `leaving`."""
        for connection in self.connections.values():
            connection.shut_down()
        self._reader.join()
