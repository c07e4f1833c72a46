"""What stands before every route of the server: keys, limits, errors, counts."""

import asyncio
import hmac
import ipaddress
import logging
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_jax.errors import InputError
from llama_jax.inference.engine.requests import EngineStopped, QueueFull
from llama_jax.serving.metrics import Metrics
from llama_jax.serving.openai_requests import RequestError, engine_error, shutdown_error
from llama_jax.serving.openai_responses import error

_log = logging.getLogger("uvicorn.error")

_OPEN = ("/", "/health")  # need no key: they tell nothing
_BODY_SECONDS = 60  # so long may a body take to arrive
_GONE = 499  # counted for clients that left


class AllowedHosts(NamedTuple):
    """The names that requests may give as their host.

    evil.example can have its name resolve to this machine (DNS rebinding). A browser then takes the
    server for a part of that site, and only the header Host tells the difference. Nobody can do so
    with an address, nor with localhost.

    Attributes:
        names: allowed beside localhost and addresses; '*' allows all.
        network: whether other machines reach the server. They may call it by a name without a dot,
            as containers do: whoever can make up such a name reaches the server anyway.
    """

    names: frozenset[str] = frozenset()
    network: bool = False

    def allow(self, host: str) -> bool:
        """Returns whether a request to `host`, with or without a port, is answered."""
        name = parse_host_name(host)
        if name is None:
            return False
        if "*" in self.names or name in self.names:
            return True
        if name == "localhost" or name.endswith(".localhost") or _is_address(name):
            return True
        return self.network and "." not in name


def parse_host_name(host: str) -> str | None:
    """Returns the name or address in 'NAME:PORT', 'NAME' or '[ADDRESS]:PORT'; None: it is none."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return None
    return name and name.rstrip(".")


def allowed_hosts(host: str, names: Sequence[str], listening_on: str) -> AllowedHosts:
    """Returns the names that requests may give as their host.

    Args:
        host: where the server was told to listen: a name or an address.
        names: of --allow-host.
        listening_on: the address that this is.

    Raises:
        InputError: one of the names is none.
    """
    for name in names:
        if name != "*" and (parse_host_name(name) != name.lower() or "/" in name):
            raise InputError(
                f"--allow-host {name!r} is not a host's name: give one such as models.example.org,"
                " without a port, or '*' for all"
            )
    network = not ipaddress.ip_address(listening_on).is_loopback
    return AllowedHosts(frozenset(name.lower() for name in (*names, host)), network)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class RequestGuard:
    """Asks for the key, refuses other sites' pages, and counts what was answered.

    Nothing of a request is logged: a failure is told by its kind and place.

    Args:
        app: what it stands before.
        api_key: None where none is asked for.
        hosts: that requests may name where no key is asked for.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, hosts: AllowedHosts, metrics: Metrics):
        self._app, self._hosts, self._metrics = app, hosts, metrics
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        begun, status = time.monotonic(), _GONE

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            refused = self._refused(Request(scope))
            if refused:
                await _response(refused)(scope, receive, noting)
            else:
                await self._app(scope, receive, noting)
        except ClientDisconnect:
            status = _GONE
        except asyncio.CancelledError:  # the server's time to end is over
            if status == _GONE:
                await _response(shutdown_error())(scope, receive, noting)
        except Exception as failure:
            where = "".join(traceback.format_tb(failure.__traceback__))
            _log.error("a request failed: %s at\n%s", type(failure).__name__, where)
            if status == _GONE:
                await _response(RequestError(500, "the server has failed"))(scope, receive, noting)
        finally:
            route = scope.get("route")
            name = "other" if route is None else route.path
            self._metrics.answered(name, status, time.monotonic() - begun)

    def _refused(self, http: Request) -> RequestError | None:
        # A page of another site must not use a server that only this machine reaches.
        if http.method == "POST" and self._from_another_site(http):
            return RequestError(403, "requests from pages of other sites are refused")
        if self._key is None:
            host = http.headers.get("host", "")
            if not host or self._hosts.allow(host):  # browsers always send one
                return None
            name = (parse_host_name(host) or host)[:200]
            return RequestError(
                403,
                f"the host {name!r} is not one of this server's: use localhost or its address,"
                f" or start it with --allow-host {name} or with a key",
            )
        if http.url.path in _OPEN:
            return None
        kind, _, key = http.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._key):
            return None
        what = "is wrong" if key else "is missing"
        return RequestError(
            401,
            f"the API key {what}: send it in the header 'Authorization: Bearer KEY'",
            code="invalid_api_key",
        )

    def _from_another_site(self, http: Request) -> bool:
        # Browsers send this one only to https, localhost and loopback addresses …
        site, origin = (http.headers.get(name) for name in ("sec-fetch-site", "origin"))
        if site is not None:
            return site not in ("none", "same-origin")
        # … and this one with every POST. A proxy may have changed the host.
        if origin is None:
            return False
        host = origin.partition("://")[2]
        return host != http.headers.get("host") and parse_host_name(host) not in self._hosts.names


async def read_body(http: Request, limit: int) -> bytes:
    """Returns the body of a request.

    Args:
        http: the request.
        limit: the most it may hold [bytes].

    Raises:
        RequestError: with status 413, it holds more; with 408, it doesn't come.
    """
    body = bytearray()
    if int(http.headers.get("content-length", 0)) <= limit:
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in http.stream():
                    body += chunk
                    if len(body) > limit:
                        break
                else:
                    return bytes(body)
        except TimeoutError as error:
            message = f"the body did not arrive within {_BODY_SECONDS} s"
            raise RequestError(408, message) from error
    raise RequestError(413, f"the body is longer than {limit} bytes", code="request_too_large")


def _response(refused: RequestError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    sent = dict(headers or {})
    if refused.status == 401:
        sent["www-authenticate"] = "Bearer"
    if refused.status in (429, 503, 504):
        sent["retry-after"] = "2"
    if refused.status in (408, 413):
        sent["connection"] = "close"  # the rest of the body is not read
    return JSONResponse(error(refused), status_code=refused.status, headers=sent)


async def _respond_request_error(http: Request, refused: Exception) -> JSONResponse:
    assert isinstance(refused, RequestError)
    return _response(refused)


async def _respond_input_error(http: Request, bad: Exception) -> JSONResponse:
    return _response(RequestError(400, str(bad)))


async def _respond_queue_full(http: Request, full: Exception) -> JSONResponse:
    message = "the queue is full: try again a little later"
    return _response(RequestError(429, message, code="queue_full"))


async def _respond_engine_stopped(http: Request, stopped: Exception) -> JSONResponse:
    assert isinstance(stopped, EngineStopped)
    return _response(engine_error(stopped.failure) if stopped.failure else shutdown_error())


async def _respond_http_exception(http: Request, problem: Exception) -> JSONResponse:
    assert isinstance(problem, HTTPException)
    sentences = {
        404: f"there is nothing at {http.url.path[:200]}: see /v1/models, /v1/completions and"
        " /v1/chat/completions",
        405: f"{http.url.path[:200]} can't be used by {http.method}",
    }
    message = sentences.get(problem.status_code, problem.detail)
    return _response(RequestError(problem.status_code, message), problem.headers)


# What the exceptions of a route are told as.
EXCEPTION_HANDLERS = {
    RequestError: _respond_request_error,
    InputError: _respond_input_error,
    QueueFull: _respond_queue_full,
    EngineStopped: _respond_engine_stopped,
    HTTPException: _respond_http_exception,
}
