"""The HTTP server: OpenAI's API for the engine, a web page and metrics."""

import ipaddress
import signal
import socket

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from llama_jax.errors import InputError
from llama_jax.inference.engine.engine import Engine
from llama_jax.serving.connections import IDLE_SECONDS, Server
from llama_jax.serving.endpoints import Endpoints, ServerSettings
from llama_jax.serving.metrics import Metrics
from llama_jax.serving.middleware import EXCEPTION_HANDLERS, RequestGuard
from llama_jax.tokenizer.tokenizer import Tokenizer

_SHUTDOWN_GRACE_SECONDS = 20  # after SIGTERM, for the requests that are running


def build_app(engine: Engine, tokenizer: Tokenizer, settings: ServerSettings) -> Starlette:
    """Returns the server as an ASGI application.

    Args:
        engine: generates the tokens.
        tokenizer: of the model.
        settings: access rules and limits.
    """
    metrics = Metrics(engine, settings.copy_bandwidth)
    endpoints = Endpoints(engine, tokenizer, settings, metrics)
    routes = [
        Route("/", endpoints.page),
        Route("/health", endpoints.health),
        Route("/metrics", endpoints.metrics),
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{name:path}", endpoints.model),
        Route("/v1/completions", endpoints.completions, methods=["POST"]),
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/tokenize", endpoints.tokenize, methods=["POST"]),
        Route("/detokenize", endpoints.detokenize, methods=["POST"]),
    ]
    guard = Middleware(
        RequestGuard, api_key=settings.api_key, hosts=settings.hosts, metrics=metrics
    )
    return Starlette(routes=routes, middleware=[guard], exception_handlers=EXCEPTION_HANDLERS)


def bind_socket(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound to the address and does not listen yet.

    Raises:
        InputError: the address is unavailable.
    """
    bound = None
    try:
        # bind checks the port's range; getaddrinfo would reduce a larger one modulo 2^16.
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address[0], port, *address[2:]))
    except (OSError, OverflowError) as error:
        if bound:
            bound.close()
        raise InputError(
            f"the server can't listen on {host}, port {port} ({error}): give another --host or"
            " --port"
        ) from error
    return bound


def startup_message(bound: socket.socket, settings: ServerSettings) -> str:
    """Returns the server's URLs, and a warning if other machines can use it without a key."""
    host, port = bound.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    message = f"{settings.name} is served at {url} (web page) and {url}/v1 (API)"
    if settings.api_key is None and not ipaddress.ip_address(host).is_loopback:
        message += "\nwarning: the server has no API key: everyone who can reach this address can"
        message += " use the model"
    return message


def create_server(app: Starlette) -> Server:
    """Returns the server that runs `app`: `run(sockets=[bind_socket(…)])`."""
    return Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,  # uvicorn's configuration would close the handlers of other loggers
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=_SHUTDOWN_GRACE_SECONDS,
        )
    )


def serve(app: Starlette, bound: socket.socket) -> None:
    """Answers requests until SIGTERM or SIGINT; running requests then have 20 s to finish."""
    # At its end uvicorn restores the previous handlers and raises the signal again. These handlers
    # ignore it, so that the process exits with code 0.
    handlers = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        create_server(app).run(sockets=[bound])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
