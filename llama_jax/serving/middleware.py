"""Runs before every route: API key, allowed hosts, body limit, error responses, metrics."""

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
from llama_jax.serving.openai_responses import error_body

_log = logging.getLogger("uvicorn.error")

_PUBLIC_PATHS = ("/", "/health")  # need no key: they contain no private information
_BODY_SECONDS = 60  # time limit for receiving a body
_CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that disconnected


class AllowedHosts(NamedTuple):
    """The host names for which the server answers requests.

    evil.example can let its name resolve to this machine (DNS rebinding). A browser then treats the
    server as a part of that site, and only the header Host shows the difference. The attack doesn't
    work with an IP address or with localhost.

    Attributes:
        names: allowed in addition to localhost and IP addresses; '*' allows all.
        network: whether other machines reach the server. They may use a name without a dot, as
            containers do: only machines of the same network can define such a name, and they
            reach the server anyway.
    """

    names: frozenset[str] = frozenset()
    network: bool = False

    def allow(self, host: str) -> bool:
        """Returns whether the server answers requests to `host`, which may include a port."""
        name = parse_host_name(host)
        if name is None:
            return False
        if "*" in self.names or name in self.names:
            return True
        if name == "localhost" or name.endswith(".localhost") or _is_address(name):
            return True
        return self.network and "." not in name


def parse_host_name(host: str) -> str | None:
    """Returns the name or address in 'NAME:PORT', 'NAME' or '[ADDRESS]:PORT'; None: invalid."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return None
    return name and name.rstrip(".")


def allowed_hosts(host: str, names: Sequence[str], listening_on: str) -> AllowedHosts:
    """Returns the host names for which the server answers requests.

    Args:
        host: name or address in --host.
        names: of --allow-host.
        listening_on: the address that `host` resolves to.

    Raises:
        InputError: one of the names is not a host name.
    """
    for name in names:
        if name != "*" and (parse_host_name(name) != name.lower() or "/" in name):
            raise InputError(
                f"--allow-host {name!r} is not a host name: give one such as models.example.org,"
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
    """Checks the API key and the origin of each request, and counts the responses.

    The log contains no text of a request: only the type of an exception and its traceback.

    Args:
        app: receives the requests that pass the checks.
        api_key: None: requests need no key.
        hosts: that requests may name, if there is no key.
        metrics: counts the responses.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, hosts: AllowedHosts, metrics: Metrics):
        self._app, self._hosts, self._metrics = app, hosts, metrics
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        start, status = time.monotonic(), _CLIENT_CLOSED_REQUEST

        async def send_and_record_status(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        async def respond_error(error: RequestError) -> None:
            await _error_response(error)(scope, receive, send_and_record_status)

        try:
            error = self._check(Request(scope))
            if error:
                await respond_error(error)
            else:
                await self._app(scope, receive, send_and_record_status)
        except ClientDisconnect:
            status = _CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:  # the grace period of the shutdown is over
            if status == _CLIENT_CLOSED_REQUEST:  # no response has started
                await respond_error(shutdown_error())
        except Exception as failure:
            trace = "".join(traceback.format_tb(failure.__traceback__))
            _log.error("a request failed: %s at\n%s", type(failure).__name__, trace)
            if status == _CLIENT_CLOSED_REQUEST:
                message = "the server failed to answer this request: its log has the traceback"
                await respond_error(RequestError(500, message))
        finally:
            route = scope.get("route")
            name = "other" if route is None else route.path
            self._metrics.count_response(name, status, time.monotonic() - start)

    def _check(self, http: Request) -> RequestError | None:
        # A page of another site must not use a server that only this machine can reach.
        if http.method == "POST" and self._from_another_site(http):
            return RequestError(403, "the server rejects requests from web pages of other sites")
        if self._key is None:
            host = http.headers.get("host", "")
            if not host or self._hosts.allow(host):  # browsers always send this header
                return None
            name = (parse_host_name(host) or host)[:200]
            return RequestError(
                403,
                f"the server does not answer to the host name {name!r}: use localhost or the"
                f" server's address, or start the server with --allow-host {name} or with a key",
            )
        if http.scope["path"] in _PUBLIC_PATHS:  # the path that the router matches
            return None
        kind, _, key = http.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._key):
            return None
        problem = "is wrong" if key else "is missing"
        return RequestError(
            401,
            f"the API key {problem}: send it in the header 'Authorization: Bearer KEY'",
            code="invalid_api_key",
        )

    def _from_another_site(self, http: Request) -> bool:
        # Browsers send sec-fetch-site only to https, localhost and loopback addresses.
        site, origin = (http.headers.get(name) for name in ("sec-fetch-site", "origin"))
        if site is not None:
            return site not in ("none", "same-origin")
        # Browsers send origin with every POST. A proxy may have changed the host.
        if origin is None:
            return False
        host = origin.partition("://")[2]
        return host != http.headers.get("host") and parse_host_name(host) not in self._hosts.names


async def read_body(http: Request, limit: int) -> bytes:
    """Returns the body of a request.

    Args:
        http: the request.
        limit: maximum length of the body [bytes].

    Raises:
        RequestError: status 413: the body is longer; 408: it didn't arrive within 60 s.
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


def _error_response(error: RequestError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    headers = dict(headers or {})
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (429, 503, 504):
        headers["retry-after"] = "2"
    if error.status in (408, 413):
        headers["connection"] = "close"  # the server doesn't read the rest of the body
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


async def _respond_request_error(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    return _error_response(error)


async def _respond_input_error(http: Request, error: Exception) -> JSONResponse:
    return _error_response(RequestError(400, str(error)))


async def _respond_queue_full(http: Request, error: Exception) -> JSONResponse:
    message = "the queue is full: try again later"
    return _error_response(RequestError(429, message, code="queue_full"))


async def _respond_engine_stopped(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, EngineStopped)
    return _error_response(engine_error(error.failure) if error.failure else shutdown_error())


async def _respond_http_exception(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path = http.scope["path"][:200]
    messages = {
        404: f"there is no route {path}: use /v1/models, /v1/completions or /v1/chat/completions",
        405: f"{path} does not support {http.method}",
    }
    message = messages.get(error.status_code, error.detail)
    return _error_response(RequestError(error.status_code, message), error.headers)


EXCEPTION_HANDLERS = {
    RequestError: _respond_request_error,
    InputError: _respond_input_error,
    QueueFull: _respond_queue_full,
    EngineStopped: _respond_engine_stopped,
    HTTPException: _respond_http_exception,
}
