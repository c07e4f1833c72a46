"""Limits the number of connections, and the time that each may wait for its client.

uvicorn alone limits the time of idle connections only, not that of requests that arrive slowly. Its
`limit_concurrency` counts idle connections as requests, and its error response is plain text.
"""

import asyncio
import errno
import json
import logging
import os
import resource
import socket
import sys
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from llama_jax.serving.openai_requests import RequestError
from llama_jax.serving.openai_responses import error_body

_log = logging.getLogger("uvicorn.error")

IDLE_SECONDS = 30  # until the first byte of a request
_HEADERS_SECONDS = 10  # from the first byte of a request to the end of its headers
_STALL_SECONDS = 60  # without the client receiving a byte of its response
_LINGER_SECONDS = 10  # from the last response until a client that still sends is disconnected
_LINGER_BYTES = 2**28  # that such a client may send
_RETRY_SECONDS = 0.05  # after a failed accept
_WARNING_SECONDS = 60  # between two warnings
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_MAX_CONNECTIONS = 4096
_RESERVED_DESCRIPTORS = 32  # for everything except connections
_BACKLOG = 2048  # connections that wait in the kernel, so that a burst is not dropped


def connection_limit() -> int:
    """Returns the number of connections that the file descriptors allow, 4096 at most."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    available = allowed - len(os.listdir("/dev/fd")) - _RESERVED_DESCRIPTORS
    return max(1, min(_MAX_CONNECTIONS, available))


class Server(uvicorn.Server):
    """Accepts connections one by one; at the limit, closes the one that waits longest.

    So silent connections, and connections with half a request, don't block other clients.
    """

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self._limit = connection_limit()
        self._accept_tasks: list[asyncio.Task[None]] = []
        self._last_warning = float("-inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to accept connections on the sockets."""
        await super().startup(sockets=[])
        for bound in sockets or []:
            bound.setblocking(False)
            bound.listen(_BACKLOG)
            self._accept_tasks.append(asyncio.create_task(self._accept(bound)))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops accepting connections, and waits for the running responses."""
        for task in self._accept_tasks:
            task.cancel()
        await super().shutdown(sockets)

    async def _accept(self, bound: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(bound)
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self._close_longest_waiting(error.strerror)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            new = Connection(self.config, self.server_state, {})
            await loop.connect_accepted_socket(lambda connection=new: connection, client)
            if len(self.server_state.connections) > self._limit:
                reason = f"the limit is {self._limit}"
                if not self._close_longest_waiting(reason, exclude=new):  # all are being answered
                    new.refuse(_too_many_connections())

    def _close_longest_waiting(
        self, reason: str | None, exclude: "Connection | None" = None
    ) -> bool:
        """Closes the connection that waits longest for its client; returns False if none waits."""
        connections: Any = self.server_state.connections  # of class Connection
        now = asyncio.get_running_loop().time()
        if now > self._last_warning + _WARNING_SECONDS:
            self._last_warning = now
            n_waiting = sum(connection.waiting for connection in connections)
            _log.warning(
                "%d connections are open, %d of them wait for their clients (%s): the server closes"
                " those that wait longest",
                len(connections), n_waiting, reason,
            )  # fmt: skip
        waiting = (c for c in connections if c.waiting and c is not exclude)
        # Connections that wait for a request's body are closed after all others: their clients have
        # sent complete headers.
        oldest = min(waiting, key=lambda c: (c.phase == "body", c.since), default=None)
        if oldest is not None:
            oldest.drop()
        return oldest is not None


def _too_many_connections() -> RequestError:
    return RequestError(503, "there are too many connections: try again later")


class Connection(H11Protocol):
    """A connection with time limits, whose errors have OpenAI's form.

    Attributes:
        phase: 'idle', 'headers' (the headers of a request arrive), 'body' (its body arrives),
            'response' (the server answers it) or 'closing' (the last response is complete).
        since: start of the phase, in the event loop's time [s].
    """

    phase = ""
    since = 0.0
    _phase_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _n_lingering = 0  # bytes received in the phase 'closing'
    _socket: asyncio.Transport

    @property
    def waiting(self) -> bool:
        """Whether it waits for bytes of its client, which has received all responses."""
        return self.phase != "response" and not self.flow.write_paused

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Starts to wait for a request."""
        self._socket = transport
        transport.set_write_buffer_limits(0)  # writing pauses while any byte is unsent
        wrapped: Any = _LingeringTransport(transport, self)
        super().connection_made(wrapped)
        self._enter_phase("idle", IDLE_SECONDS, self._close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels the timers."""
        self._enter_phase("closing", None, self._close)
        if self._phase_timer is not None:
            self._phase_timer.cancel()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses bytes of requests; discards those that follow the last response."""
        if self.phase != "closing":
            super().data_received(data)
            return
        self._n_lingering += len(data)
        if self._n_lingering > _LINGER_BYTES:
            self._close()

    def handle_events(self) -> None:
        """Handles the parsed parts of a request."""
        super().handle_events()
        self._update_phase()

    def on_response_complete(self) -> None:
        """Starts to wait for the next request."""
        super().on_response_complete()
        self._update_phase()

    def send_400_response(self, msg: str) -> None:
        """Answers invalid HTTP."""
        error = sys.exception()  # h11's exception contains the reason and a status
        status = getattr(error, "error_status_hint", 400)
        reason = str(error).partition(": bytearray")[0]  # omits the client's bytes
        self.refuse(RequestError(status, f"this is not a valid HTTP request: {reason[:200]}"))

    def refuse(self, error: RequestError) -> None:
        """Sends an error response without calling a route, and closes the connection."""
        cycle, body = self.cycle, json.dumps(error_body(error)).encode()
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True  # its route must not send a response any more
            cycle.message_event.set()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        if error.status == 503:
            headers["retry-after"] = "2"
        phrase = STATUS_PHRASES[error.status]
        try:
            for event in (
                h11.Response(
                    status_code=error.status, headers=list(headers.items()), reason=phrase
                ),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self._socket.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # another response is half sent
            self._abort()
        else:
            self.close_after_reading()

    def drop(self) -> None:
        """Closes at once; a client that has sent a part of a request gets an error first."""
        if self.phase in ("headers", "body"):
            self.refuse(_too_many_connections())
        self._abort()

    def close_after_reading(self) -> None:
        """Closes when the client has sent all its bytes, so that it can read the last response.

        Closing with unread bytes, or before more bytes arrive, resets the connection: the client
        may then lose the response.
        """
        if self.phase == "closing":
            return
        self._enter_phase("closing", _LINGER_SECONDS, self._close)
        if self.conn.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED):
            self._socket.close()  # as soon as the response is sent
        else:
            self._socket.write_eof()
            self._socket.resume_reading()

    def shutdown(self) -> None:
        """Closes the connection, now or after its response."""
        if self.phase == "closing":
            self._close()
        else:
            super().shutdown()

    def pause_writing(self) -> None:
        """Starts the time limit for a client that receives nothing of its response."""
        super().pause_writing()
        self._start_stall_timer(self._socket.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Continues with the response."""
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _start_stall_timer(self, n_unsent: int) -> None:
        self._stall_timer = self.loop.call_later(_STALL_SECONDS, self._abort_if_stalled, n_unsent)

    def _abort_if_stalled(self, n_unsent_before: int) -> None:
        n_unsent = self._socket.get_write_buffer_size()
        if n_unsent < n_unsent_before:
            self._start_stall_timer(n_unsent)
        else:
            self._abort()

    def _update_phase(self) -> None:
        """Enters the phase that follows from the states of the request and the response."""
        if self.phase == "closing":
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # The route itself limits the time of a body that it reads.
            phase = "body" if self.cycle.more_body else "response"
            self._enter_phase(phase, None, self._close)
        elif self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._enter_phase("headers", _HEADERS_SECONDS, self._refuse_slow_headers)
        else:  # also while the body of an answered request still arrives
            self._enter_phase("idle", IDLE_SECONDS, self._close)

    def _enter_phase(
        self, phase: str, seconds: float | None, on_timeout: Callable[[], None]
    ) -> None:
        if phase == self.phase:
            return
        if self._phase_timer is not None:
            self._phase_timer.cancel()
        self.phase, self.since = phase, self.loop.time()
        timer = None if seconds is None else self.loop.call_later(seconds, on_timeout)
        self._phase_timer = timer

    def _refuse_slow_headers(self) -> None:
        message = f"the headers of the request did not arrive within {_HEADERS_SECONDS} s"
        self.refuse(RequestError(408, message))

    def _close(self) -> None:
        if self.flow.write_paused:  # the client still receives its response
            self._enter_phase("closing", None, self._close)
            self._socket.close()
        else:
            self._abort()

    def _abort(self) -> None:
        # The event loop frees the file descriptor in its next iteration.
        self.connections.discard(self)
        self._socket.abort()


class _LingeringTransport:
    """The transport that uvicorn sees: its `close` lets the client read the last response first."""

    def __init__(self, transport: asyncio.Transport, connection: Connection):
        self._transport, self._connection = transport, connection

    def close(self) -> None:
        self._connection.close_after_reading()

    def is_closing(self) -> bool:
        return self._connection.phase == "closing" or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
