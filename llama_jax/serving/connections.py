"""The server's connections: how many there may be, and how long each may wait for its client.

uvicorn has a time limit for idle connections alone, and none for requests that arrive in part. Its
`limit_concurrency` counts idle connections as requests, and refuses in plain text.
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
from llama_jax.serving.openai_responses import error

_log = logging.getLogger("uvicorn.error")

IDLE_SECONDS = 30  # until a request begins
_HEAD_SECONDS = 10  # from the first byte of a request to the end of its headers
_STALL_SECONDS = 60  # in which a client takes nothing of its answer
_LINGER_SECONDS = 10  # from the last answer until a client that still sends is cut off
_LINGER_BYTES = 2**28  # that such a client may send
_RETRY_SECONDS = 0.05  # after accept has failed
_WARNING_SECONDS = 60  # between two warnings
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_MOST = 4096  # connections
_SPARE = 32  # file descriptors for everything but connections
_BACKLOG = 2048  # connections that wait in the kernel: a burst is accepted, not dropped


def connection_limit() -> int:
    """Returns how many connections this process has file descriptors for, 4096 at most."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed == resource.RLIM_INFINITY:
        return _MOST
    return max(1, min(_MOST, allowed - len(os.listdir("/dev/fd")) - _SPARE))


class Server(uvicorn.Server):
    """Accepts connections one by one; where there is no room, closes the one that waits longest.

    So connections on which nothing is asked, or half a request, keep nobody out.
    """

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self._limit = connection_limit()
        self._accepting: list[asyncio.Task[None]] = []
        self._warned = float("-inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to accept connections on the sockets."""
        await super().startup(sockets=[])
        for bound in sockets or []:
            bound.setblocking(False)
            bound.listen(_BACKLOG)
            self._accepting.append(asyncio.create_task(self._accept(bound)))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts no more connections, and lets answers come to their end."""
        for task in self._accepting:
            task.cancel()
        await super().shutdown(sockets)

    async def _accept(self, bound: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(bound)
            except OSError as failure:
                if failure.errno in _EXHAUSTED:
                    self._make_room(failure.strerror)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            connection = Connection(self.config, self.server_state, {})
            await loop.connect_accepted_socket(lambda it=connection: it, client)
            if len(self.server_state.connections) > self._limit:
                made = self._make_room(f"the limit is {self._limit}", besides=connection)
                if not made:  # all others are being answered
                    connection.refuse(_too_many())

    def _make_room(self, reason: str | None, besides: "Connection | None" = None) -> bool:
        """Closes the connection that waits longest for its client; False: none does."""
        connections: Any = self.server_state.connections  # of our class
        now = asyncio.get_running_loop().time()
        if now > self._warned + _WARNING_SECONDS:
            self._warned = now
            n_waiting = sum(one.waiting for one in connections)
            _log.warning(
                "%d connections are open, %d of which wait for their clients (%s): those that wait"
                " longest are closed",
                len(connections), n_waiting, reason,
            )  # fmt: skip
        waiting = (one for one in connections if one.waiting and one is not besides)
        # A request of which the body is missing is more than an idle connection.
        oldest = min(waiting, key=lambda one: (one.phase == "body", one.since), default=None)
        if oldest is not None:
            oldest.give_up()
        return oldest is not None


def _too_many() -> RequestError:
    return RequestError(503, "there are too many connections: try again later")


class Connection(H11Protocol):
    """A connection with time limits, and errors in OpenAI's form.

    Attributes:
        phase: 'idle', 'head' (a request begins to arrive), 'body' (its body does), 'answer' (it is
            being answered) or 'ending' (the last answer has been given).
        since: when the phase began, in the time of the event loop [s].
    """

    phase = ""
    since = 0.0
    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _lingering = 0  # bytes received in the phase 'ending'
    _socket: asyncio.Transport

    @property
    def waiting(self) -> bool:
        """Whether it waits for bytes of its client, which has taken all of its answers."""
        return self.phase != "answer" and not self.flow.write_paused

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Begins to wait for a request."""
        self._socket = transport
        transport.set_write_buffer_limits(0)  # writing pauses while anything is unsent
        gentle: Any = _Transport(transport, self)
        super().connection_made(gentle)
        self._enter("idle", IDLE_SECONDS, self._close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Lets go of everything."""
        self._enter("ending", None, self._close)
        if self._timer is not None:
            self._timer.cancel()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Takes bytes of requests; those that come after the last answer count for nothing."""
        if self.phase != "ending":
            super().data_received(data)
            return
        self._lingering += len(data)
        if self._lingering > _LINGER_BYTES:
            self._close()

    def handle_events(self) -> None:
        """Does what the bytes that have come ask for."""
        super().handle_events()
        self._follow()

    def on_response_complete(self) -> None:
        """Begins to wait for the next request."""
        super().on_response_complete()
        self._follow()

    def send_400_response(self, msg: str) -> None:
        """Answers what is not valid HTTP."""
        problem = sys.exception()  # h11 says what is wrong, and the status that fits
        status = getattr(problem, "error_status_hint", 400)
        reason = str(problem).partition(": bytearray")[0]  # without the client's bytes
        self.refuse(RequestError(status, f"this is not a valid HTTP request: {reason[:200]}"))

    def refuse(self, refused: RequestError) -> None:
        """Answers with an error outside of any route, and ends the connection."""
        cycle, body = self.cycle, json.dumps(error(refused)).encode()
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True  # its route is not to answer any more
            cycle.message_event.set()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        if refused.status == 503:
            headers["retry-after"] = "2"
        reason = STATUS_PHRASES[refused.status]
        try:
            for part in (
                h11.Response(
                    status_code=refused.status, headers=list(headers.items()), reason=reason
                ),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self._socket.write(self.conn.send(part) or b"")
        except h11.LocalProtocolError:  # in the middle of another answer
            self._abort()
        else:
            self.end()

    def give_up(self) -> None:
        """Closes at once, with an error if a part of a request has come."""
        if self.phase in ("head", "body"):
            self.refuse(_too_many())
        self._abort()

    def end(self) -> None:
        """Closes once the client has sent everything, so that it can read the last answer.

        Where bytes of the client are unread, or come later, closing resets the connection, and
        the client may lose the answer.
        """
        if self.phase == "ending":
            return
        self._enter("ending", _LINGER_SECONDS, self._close)
        if self.conn.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED):
            self._socket.close()  # as soon as the answer is sent
        else:
            self._socket.write_eof()
            self._socket.resume_reading()

    def shutdown(self) -> None:
        """Ends the connection, now or after its answer."""
        if self.phase == "ending":
            self._close()
        else:
            super().shutdown()

    def pause_writing(self) -> None:
        """Gives the client some time to take a part of its answer."""
        super().pause_writing()
        self._watch(self._socket.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Goes on with the answer."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _watch(self, unsent: int) -> None:
        self._stalled = self.loop.call_later(_STALL_SECONDS, self._check, unsent)

    def _check(self, unsent: int) -> None:
        left = self._socket.get_write_buffer_size()
        if left < unsent:
            self._watch(left)
        else:
            self._abort()

    def _follow(self) -> None:
        """Enters the phase that the connection has come to."""
        if self.phase == "ending":
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # A route has a limit of its own for the body that it reads.
            self._enter("body" if self.cycle.more_body else "answer", None, self._close)
        elif self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._enter("head", _HEAD_SECONDS, self._too_slow)
        else:  # also while the body of an answered request still comes
            self._enter("idle", IDLE_SECONDS, self._close)

    def _enter(self, phase: str, seconds: float | None, late: Callable[[], None]) -> None:
        if phase == self.phase:
            return
        if self._timer is not None:
            self._timer.cancel()
        self.phase, self.since = phase, self.loop.time()
        self._timer = None if seconds is None else self.loop.call_later(seconds, late)

    def _too_slow(self) -> None:
        message = f"the headers of the request did not arrive within {_HEAD_SECONDS} s"
        self.refuse(RequestError(408, message))

    def _close(self) -> None:
        if self.flow.write_paused:  # the client is still taking its answer
            self._enter("ending", None, self._close)
            self._socket.close()
        else:
            self._abort()

    def _abort(self) -> None:
        self.connections.discard(self)  # its file descriptor is free in the loop's next turn
        self._socket.abort()


class _Transport:
    """The transport that uvicorn closes: the connection decides when."""

    def __init__(self, transport: asyncio.Transport, connection: Connection):
        self._transport, self._connection = transport, connection

    def close(self) -> None:
        self._connection.end()

    def is_closing(self) -> bool:
        return self._connection.phase == "ending" or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
