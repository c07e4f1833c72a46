"""The control channel: one TCP connection from each host of a run to host 0, the coordinator.

It carries the messages for which JAX has no collective: the coordinator's decisions, the step to
stop before, and the first error, which ends all hosts. `handshake` opens it before JAX joins the
hosts.

A closed connection means a dead host. The kernel closes the connections of a killed process at
once, and keepalive probes detect a host without power or network. Neither needs a thread to run in
time: a host that compiles or tokenizes for minutes on a busy machine never counts as dead. A hung
process keeps its connection open; JAX's heartbeat detects it.

Only hosts that passed the handshake are connected. Still, each message is bounded in size, and its
structure is checked; a malformed one is ignored with one line on standard error.
"""

import contextlib
import json
import os
import queue
import selectors
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from llama_jax.runtime.connection import MESSAGE_BYTES, Connection

DECISION_BYTES = 1 << 26  # the largest decision, which is sent in parts
_PART_CHARACTERS = MESSAGE_BYTES // 4  # a message has at most two bytes for each of them
SHUTDOWN_SECONDS = 5.0  # after an error, for all processes to end


def log(message: str) -> None:
    """Prints a line on standard error, unless that is closed."""
    with contextlib.suppress(OSError, ValueError):
        print(f"llama-jax: {message}", file=sys.stderr, flush=True)


class ControlChannel:
    """The connections of one host to the other hosts of the run.

    Attributes:
        process: number of this host.
        names: names of all hosts.
        connections: by number of host; on host 0 one to each other host, elsewhere one to host 0.
        decisions: results of `hosts.broadcast_decision` from host 0, in order.
        values: on host 0, the values to compare from each other host, in order.
        describe_state: returns where this host is (plain JSON), for `ask`. The reader thread calls
            it, so that it is answered while the main thread hangs.
        states: answers of other hosts to `ask`, by number of host.
        reports: on host 0, what the hosts report without being asked: number of the host, content.
        leaving: True once the run is over, and connections may close.
    """

    def __init__(self, process: int, names: list[str], connections: dict[int, Connection]):
        self.process, self.names, self.connections = process, names, connections
        self.decisions: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.values: dict[int, queue.SimpleQueue[dict[str, Any]]] = {
            i: queue.SimpleQueue() for i in connections
        }
        self.reports: queue.SimpleQueue[tuple[int, list[Any]]] = queue.SimpleQueue()
        self.describe_state: Callable[[], Any] = dict
        self.states: dict[int, Any] = {}
        self.leaving = False
        self._parts: list[str] = []  # of the decision that host 0 is sending
        self._shutting_down = threading.Lock()
        self._malformed: set[int] = set()  # hosts that sent a malformed message
        self._steps = threading.Condition()
        self._newest_step = -1  # the newest one that the main thread passed to `stop_before`
        self._stop_requested = self._choosing_step = False
        self._newest_steps: dict[int, int] | None = None  # on host 0, by host, once it has asked
        self._reason = ""
        self._stop: tuple[int, str] | None = None  # the chosen step, and the reason
        self._reader = threading.Thread(target=self._read, daemon=True, name="control channel")
        self._reader.start()

    def name(self, process: int) -> str:
        """Returns 'host 2 (node17)'."""
        return f"host {process} ({self.names[process]})"

    def to_coordinator(self, kind: str, content: Any) -> None:
        """Sends a message to host 0, which may be this host."""
        if self.process == 0:
            self._handle(0, kind, content)
        else:
            self.connections[0].send(kind, content)

    def to_others(self, kind: str, content: Any) -> None:
        """Sends a message from host 0 to all others, or from another host to host 0."""
        for connection in self.connections.values():
            connection.send(kind, content)

    def decide(self, decision: Any) -> None:
        """Sends a decision (plain JSON) from host 0 to all others, in parts if it is large.

        Raises:
            ValueError: the decision is larger than DECISION_BYTES.
        """
        text = json.dumps(decision)
        if len(text) > DECISION_BYTES:
            raise ValueError(f"a decision of {len(text)} bytes: {text[:80]} …")
        if len(text) <= _PART_CHARACTERS:
            self.to_others("decision", decision)
            return
        for start in range(0, len(text), _PART_CHARACTERS):
            self.to_others("decision part", text[start : start + _PART_CHARACTERS])
        self.to_others("decision end", None)

    def ask(self) -> None:
        """Asks all hosts to which this one is connected for their state: fills `states`."""
        self.states = {}
        self.to_others("ask", None)

    def _to_all(self, kind: str, content: Any) -> None:
        self.to_others(kind, content)
        self._handle(0, kind, content)

    def _read(self) -> None:
        try:
            self._read_until_closed()
        except Exception as error:
            # Without this thread, no host would detect a dead one.
            traceback.print_exception(error)
            self.fail(f"{type(error).__name__}: {error}", 1)

    def _read_until_closed(self) -> None:
        selector = selectors.DefaultSelector()
        for process, connection in self.connections.items():
            selector.register(connection.socket, selectors.EVENT_READ, process)
            # Messages that arrived with the last one of the handshake.
            self._handle_received(process)
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
                        f"{self.name(key.data)} has died or can't be reached: see its output, then"
                        " start all hosts again with the same command",
                        1,
                    )

    def _handle_received(self, process: int) -> None:
        received = self.connections[process].received
        while received:
            self._handle(process, *(received.popleft() or ("malformed", None)))

    def _handle(self, sender: int, kind: str, content: Any) -> None:
        """Handles a message from the host `sender`."""
        match kind, content:
            case "decision", _ if sender == 0:
                self.decisions.put(content)
            case "decision part", str(part) if sender == 0 and self._has_room(part):
                self._parts.append(part)
            case "decision end", None if sender == 0 and self._parts:
                self.decisions.put(json.loads("".join(self._parts)))
                self._parts.clear()
            case "values", dict():
                self.values[sender].put(content)
            case "ask", None:
                self.connections[sender].send("state", self.describe_state())
            case "state", dict():
                self.states[sender] = content
            case "report", [*_]:
                self.reports.put((sender, [*content]))
            case "error", [str(message), int(code)] if 0 <= code < 256:
                self._shut_down_all(message, code)
            case "shutdown", [str(message), int(code)] if sender == 0 and 0 <= code < 256:
                self._exit(message, code)
            case "stop request", str(reason):
                with self._steps:
                    if self._newest_steps is None:
                        self._newest_steps, self._reason = {}, reason
                        self._to_all("which step", None)
            case "which step", None if sender == 0:
                with self._steps:
                    self._choosing_step = True
                    self.to_coordinator("step", self._newest_step)
            case "step", int(step):
                with self._steps:
                    self._collect_newest_step(sender, step)
            case "stop before", [int(step), str(reason)] if sender == 0:
                with self._steps:
                    self._stop, self._choosing_step = (step, reason), False
                    self._steps.notify_all()
            case _:
                if sender not in self._malformed:
                    self._malformed.add(sender)
                    log(
                        f"ignored a malformed message from {self.name(sender)}: do all hosts run"
                        " the same version?"
                    )

    def _has_room(self, part: str) -> bool:
        return sum(map(len, self._parts)) + len(part) <= DECISION_BYTES

    # All hosts must stop before the same step: a host that has already dispatched a later step
    # would deadlock in its collectives. So host 0 asks each for its newest step, and chooses the
    # one after the newest of all. A host that has answered dispatches no step until it knows the
    # choice. The reader thread answers, so that a host whose main thread waits for its device
    # doesn't delay the others.

    def stop_before(self, step: int, reason: str | None) -> str | None:
        """Returns the reason to stop before `step`, the same step on all hosts; None: continue.

        Args:
            step: the step that this host dispatches next.
            reason: of this host to stop, or None.
        """
        if reason and not self._stop_requested:
            self._stop_requested = True
            self.to_coordinator("stop request", f"{reason} on {self.name(self.process)}")
        with self._steps:
            self._steps.wait_for(lambda: not self._choosing_step)
            self._newest_step = max(step, self._newest_step)
            return self._stop[1] if self._stop and step >= self._stop[0] else None

    def _collect_newest_step(self, sender: int, step: int) -> None:
        if self._newest_steps is not None and self._stop is None:
            self._newest_steps[sender] = step
            if len(self._newest_steps) == len(self.names):
                self._to_all("stop before", [max(self._newest_steps.values()) + 1, self._reason])

    def fail(self, message: str, code: int) -> NoReturn:
        """Ends all hosts with the first error of any host, which may be earlier than this one."""
        message = f"{self.name(self.process)}: {message}"
        self.to_coordinator("error", [message, code])
        time.sleep(SHUTDOWN_SECONDS)  # host 0 broadcasts the error that was first
        self._exit(message, code)

    def end(self, message: str, code: int) -> NoReturn:
        """Ends this host, and on host 0 all others that can be reached."""
        if self.process == 0:
            self._shut_down_all(message, code)
        self._exit(message, code)

    def _shut_down_all(self, message: str, code: int) -> NoReturn:
        self._shutting_down.acquire()  # never released: all hosts print the first error only
        try:
            if self.process == 0:
                self.to_others("shutdown", [message, code])
                # When this process exits, JAX aborts in all others that still run. Wait for them.
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
        # sys.exit would not do: the main thread may wait in a collective that never ends, and JAX
        # waits for all hosts at exit.
        os._exit(code)

    def close(self) -> None:
        """Closes the connections, once all hosts are `leaving`."""
        for connection in self.connections.values():
            connection.shut_down()
        self._reader.join()
