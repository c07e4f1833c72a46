"""A connection between two hosts of a run, for the messages of the control channel."""

import contextlib
import json
import socket
import threading
import time
from collections import deque
from typing import Any

MESSAGE_BYTES = 1 << 20  # the largest message; names of 10,000 hosts take 0.7 MB
SEND_SECONDS = 5.0  # a host that reads nothing for this long counts as dead
# Keepalive: a host that answers no probe for 10 + 4 × 5 seconds counts as dead. A network reroutes
# in less time, and the start of a run takes longer.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}


class Connection:
    """A TCP connection that carries messages: a kind and plain JSON, one line each.

    Attributes:
        limit: longest line in bytes; longer ones are malformed and use no more memory.
        received: messages that have arrived, in order; None for a malformed one.
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
        """Sends a message. On a failure it closes the connection, which the reader detects.

        Raises:
            ValueError: the message is larger than MESSAGE_BYTES.
        """
        line = json.dumps([kind, content]).encode()
        if len(line) > MESSAGE_BYTES:
            raise ValueError(f"a message of {len(line)} bytes to another host: {line[:80]!r} …")
        with self._sending:
            try:
                self.socket.sendall(line + b"\n")
            except OSError:  # part of a line may be sent: the connection is unusable
                self.shut_down()

    def read(self) -> bool:
        """Appends arrived messages to `received`; returns False if the other end has closed."""
        try:
            data = self.socket.recv(1 << 16)
        except (BlockingIOError, TimeoutError):
            return True
        except OSError:
            return False
        *lines, rest = (self._rest + data).split(b"\n")
        self.received += [self._parse(line) for line in lines]
        if len(rest) > self.limit:
            self.received.append(None)
        self._rest = rest[: self.limit + 1]  # one byte too many marks the line as malformed
        return bool(data)

    def _parse(self, line: bytes) -> tuple[str, Any] | None:
        if len(line) > self.limit:
            return None
        try:
            match json.loads(line):
                case [str(kind), content]:
                    return kind, content
        except (ValueError, RecursionError):  # not JSON, or nested too deeply for Python
            pass
        return None

    def wait(self, deadline: float) -> tuple[str, Any] | None:
        """Returns the next message, or None for a malformed one.

        Args:
            deadline: when to stop waiting, on the clock `time.monotonic` [s].

        Raises:
            TimeoutError: no message arrived.
            ConnectionError: the other end has closed.
        """
        while not self.received:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self.socket.settimeout(remaining)
            alive = self.read()
            self.socket.settimeout(SEND_SECONDS)
            if not alive and not self.received:
                raise ConnectionError
        return self.received.popleft()

    def shut_down(self) -> None:
        """Shuts the connection down for both ends, without closing the socket."""
        with contextlib.suppress(OSError):  # the other end has closed it
            self.socket.shutdown(socket.SHUT_RDWR)
