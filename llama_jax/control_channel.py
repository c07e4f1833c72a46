"""Connections between the processes of a run: a star with process 0, the first, in the middle.

Every other process holds one TCP connection to the first. They meet there before JAX joins them,
because JAX aborts with a stack trace where one is missing or miscounted. Later the star carries
what collectives can't: what the first alone decides, the step to stop before, and the first error,
which ends all.

A death is seen by the end of its connection. The kernel closes that when a process is killed, at
once, and answers the keepalive probes that find a host without power or network. So no thread has
to get its turn in time: a host that compiles or tokenizes for minutes, on a machine however busy,
is never taken for dead. A process that hangs keeps its connection; that is left to the heartbeat
of JAX (100 seconds).
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
from typing import Any, NoReturn

from llama_jax.errors import InputError

JOIN_SECONDS = 300.0  # for the slowest host to start
LATE_SECONDS = 5.0  # in which processes that come after a mistake was seen are told of it too
LEAVE_SECONDS = 5.0  # in which all processes end after an error
# Keepalive: a host that answers nothing for 10 + 4 × 5 seconds is gone. Longer than a network
# takes to find another way, and short beside the start of a run.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}


class Link:
    """A connection that carries messages: a kind and plain JSON, a line each."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option, value in _KEEPALIVE.items():
            if hasattr(socket, option):  # macOS lacks some
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._sending = threading.Lock()
        self._rest = b""

    def send(self, kind: str, content: Any = None) -> None:
        """Sends a message; where the connection is broken, that is seen by who reads it."""
        with self._sending, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps([kind, content]).encode() + b"\n")

    def receive(self) -> list[tuple[str, Any]] | None:
        """Waits for messages and returns them; None: the other end is gone."""
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            raise
        except OSError:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [tuple(json.loads(line)) for line in lines] if data else None

    def first(self, seconds: float) -> tuple[str, Any]:
        """Waits for the first message; of the kind 'none' if there is none that makes sense."""
        self.socket.settimeout(seconds)
        messages: list[tuple[str, Any]] | None = []
        with contextlib.suppress(TimeoutError, ValueError, TypeError):
            while messages == []:
                messages = self.receive()
        self.socket.settimeout(None)
        return messages[0] if messages and len(messages[0]) == 2 else ("none", None)


class Star:
    """The processes of a run, as one of them sees them.

    Attributes:
        process: number of this one.
        decisions: what the first has decided, in turn.
        parts: on the first, what each other process has told it, in turn.
        leaving: the run is over, and connections may end.
    """

    def __init__(self, process: int, names: list[str], links: dict[int, Link]):
        self.process, self.names, self.links = process, names, links
        self.decisions: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.parts: dict[int, queue.SimpleQueue[Any]] = {i: queue.SimpleQueue() for i in links}
        self.leaving = False
        self._ending = threading.Lock()
        self._steps = threading.Condition()
        self._asked_before = -1  # the newest step that the main thread asked about
        self._wished = self._choosing = False
        self._answers: dict[int, int] | None = None
        self._stop: tuple[int, str] | None = None
        self._watching = threading.Thread(target=self._watch, daemon=True, name="star")
        self._watching.start()

    def name(self, process: int) -> str:
        """Returns 'host 2 (node17)'."""
        return f"host {process} ({self.names[process]})"

    def to_first(self, kind: str, content: Any) -> None:
        """Sends a message to the first process, which may be this one."""
        if self.process == 0:
            self._take(0, kind, content)
        else:
            self.links[0].send(kind, content)

    def to_others(self, kind: str, content: Any) -> None:
        """Sends a message from the first process to all others."""
        for link in self.links.values():
            link.send(kind, content)

    def _to_all(self, kind: str, content: Any) -> None:
        self.to_others(kind, content)
        self._take(0, kind, content)

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for process, link in self.links.items():
            selector.register(link.socket, selectors.EVENT_READ, process)
        while selector.get_map():
            for key, _ in selector.select():
                messages = self.links[key.data].receive()
                for kind, content in messages or []:
                    self._take(key.data, kind, content)
                if messages is None:
                    selector.unregister(key.fileobj)
                    if self.leaving:
                        self.links[key.data].socket.close()
                    else:
                        self._end_all(
                            f"{self.name(key.data)} has died or can't be reached: look at its own"
                            " output, and start all again to go on from the last checkpoint",
                            1,
                        )

    def _take(self, process: int, kind: str, content: Any) -> None:
        """Does what a message from `process` asks for."""
        if kind == "decision":
            self.decisions.put(content)
        elif kind == "part":
            self.parts[process].put(content)
        elif kind == "error":
            self._end_all(*content)
        elif kind == "end":
            self._end(*content)
        else:
            with self._steps:
                self._take_step(process, kind, content)

    # Which step to stop before. No process may have handed a later one to its device, or the others
    # would wait for it in vain. So the first asks all how far they are; who has answered hands over
    # no further step until the choice is known, and threads of their own answer, so that a process
    # which waits for its device keeps nobody waiting.

    def stop_before(self, step: int, wanted: str | None) -> str | None:
        """Tells why to stop before `step`, at the same one on all; `wanted` is a reason to stop."""
        if wanted and not self._wished:
            self._wished = True
            self.to_first("wish", f"{wanted} on {self.name(self.process)}")
        with self._steps:
            self._steps.wait_for(lambda: not self._choosing)
            self._asked_before = max(step, self._asked_before)
            return self._stop[1] if self._stop and step >= self._stop[0] else None

    def _take_step(self, process: int, kind: str, content: Any) -> None:
        if kind == "wish" and self._answers is None:
            self._answers, self._why = {}, content
            self._to_all("how far", None)
        elif kind == "how far":
            self._choosing = True
            self.to_first("so far", self._asked_before)
        elif kind == "so far" and self._answers is not None:
            self._answers[process] = content
            if len(self._answers) == len(self.names):
                self._to_all("stop", [max(self._answers.values()) + 1, self._why])
        elif kind == "stop":
            self._stop = (content[0], content[1])
            self._choosing = False
            self._steps.notify_all()

    def fail(self, message: str, code: int) -> NoReturn:
        """Ends all processes with the first error of any, which need not be this one."""
        message = f"{self.name(self.process)}: {message}"
        self.to_first("error", [message, code])
        time.sleep(LEAVE_SECONDS)  # the first process has the word
        self._end(message, code)

    def _end_all(self, message: str, code: int) -> NoReturn:
        self._ending.acquire()  # never given back: there is one end
        if self.process == 0:
            self.to_others("end", [message, code])
            # When this process goes, JAX aborts in all that are still there.
            deadline = time.monotonic() + LEAVE_SECONDS
            for link in self.links.values():
                with contextlib.suppress(TimeoutError):
                    link.socket.settimeout(max(0.01, deadline - time.monotonic()))
                    while link.receive() is not None:
                        pass
        self._end(message, code)

    def _end(self, message: str, code: int) -> NoReturn:
        print(f"llama-jax: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # The main thread may wait in a collective that never ends, and JAX's own end waits for all.
        os._exit(code)

    def close(self) -> None:
        """Ends the connections, once all are `leaving`."""
        for link in self.links.values():
            with contextlib.suppress(OSError):  # the other end was faster
                link.socket.shutdown(socket.SHUT_RDWR)
        self._watching.join()


def meet(host: str, port: int, processes: int, process: int) -> tuple[Star, int]:
    """Returns the star of all processes, and a free port on the host of the first.

    Args:
        host: where the first process runs, as the others reach it.
        port: where it waits for them.
        processes: number of processes in all.
        process: number of this one.

    Raises:
        InputError: they don't all come, or not as they should.
    """
    if process == 0:
        links, names = _wait_for_others(port, processes)
        with socket.create_server(("", 0)) as free:
            meeting = free.getsockname()[1]
        for link in links.values():
            link.send("go", [names, meeting])
        return Star(process, names, links), meeting
    link = _reach_first(host, port)
    link.send("hello", [process, processes, socket.gethostname()])
    kind, content = link.first(JOIN_SECONDS)
    if kind == "go":
        return Star(process, content[0], {0: link}), content[1]
    link.socket.close()
    raise InputError(
        content
        if kind == "refused"
        else f"host 0 at {host}:{port} does not answer as one of this run: look at its output, and"
        " whether another program uses the port"
    )


def _reach_first(host: str, port: int) -> Link:
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            return Link(socket.create_connection((host, port), timeout=10))
        except OSError as error:  # its name may not be known yet, its process not started
            if time.monotonic() > deadline:
                raise InputError(
                    f"can't reach host 0 at {host}:{port} within {JOIN_SECONDS:.0f} s"
                    f" ({error.strerror or error}): start it, or correct the address"
                ) from error
        time.sleep(0.2)


def _wait_for_others(port: int, processes: int) -> tuple[dict[int, Link], list[str]]:
    """Returns a link to each other process, and the names of all hosts."""
    names = {0: socket.gethostname()}
    links: dict[int, Link] = {}
    refused: list[Link] = []
    mistake = ""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=4096)
    except OSError as error:
        raise InputError(
            f"can't wait for the other hosts at port {port} ({error.strerror}): does another run"
            " use it, or is this not host 0?"
        ) from error
    deadline = time.monotonic() + JOIN_SECONDS
    with server:
        while len(links) < processes - 1 and time.monotonic() < deadline:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                link = Link(server.accept()[0])
            except TimeoutError:
                break
            kind, content = link.first(10)
            if kind != "hello":
                link.socket.close()
                continue  # not one of us: a scan of the network, a check of health
            process, theirs, name = content
            if theirs != processes:
                wrong = f"host {process} ({name}) was started with --processes {theirs}, host 0"
                wrong += f" with {processes}: start all with the same number"
            elif process in names:
                wrong = f"two processes say that they are host {process} of {processes}"
                wrong += f" ({names[process]} and {name}): number them from 0 to {processes - 1}"
            else:
                names[process], links[process] = name, link
                continue
            refused.append(link)
            mistake = mistake or wrong
            deadline = min(deadline, time.monotonic() + LATE_SECONDS)
    missing = [str(i) for i in range(processes) if i not in names]
    if missing and not mistake:
        mistake = f"of {processes} hosts {len(names)} have come within {JOIN_SECONDS:.0f} s: start"
        mistake += f" also {', '.join(missing[:20])}, or look why they can't reach port {port} here"
    if mistake:
        for link in [*links.values(), *refused]:
            link.send("refused", mistake)
            link.socket.close()
        raise InputError(mistake)
    return links, [names[i] for i in range(processes)]
