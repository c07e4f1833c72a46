"""The HTTP server: OpenAI's API in front of the engine, a page, and metrics."""

import asyncio
import ipaddress
import logging
import secrets
import signal
import socket
import time
from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from llama_jax.errors import InputError
from llama_jax.inference.complete import prompt_ids
from llama_jax.inference.engine.engine import Engine
from llama_jax.inference.engine.requests import Request
from llama_jax.serving import openai_responses as shapes
from llama_jax.serving.connections import IDLE_SECONDS, Server
from llama_jax.serving.metrics import CONTENT_TYPE, Metrics
from llama_jax.serving.middleware import EXCEPTION_HANDLERS, AllowedHosts, RequestGuard, read_body
from llama_jax.serving.openai_requests import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    RequestError,
    check_prompt,
    new_tokens,
    parse,
)
from llama_jax.serving.sse import respond
from llama_jax.serving.text_stream import OutputOptions, ResponseStream
from llama_jax.tokenizer.tokenizer import Tokenizer

_log = logging.getLogger("uvicorn.error")

_USUAL_TOKENS = 16  # of a completion, as OpenAI's
_GRACE = 20  # so long may texts go on that are being made when the server is stopped [s]
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline';"
    " script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class ServerSettings(NamedTuple):
    """What the server allows."""

    name: str  # of the model
    api_key: str | None = None  # None: no key is asked for
    hosts: AllowedHosts = AllowedHosts()  # that requests may name where no key is asked for
    max_tokens: int = 4096  # of one text
    max_body: int = 2**21  # of a request [bytes]
    timeout: float = 600.0  # of a request [s]
    copy_bandwidth: float | None = None  # of the machine, for /metrics [bytes/s]


class _Endpoints:
    """What each route does."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, settings: ServerSettings, metrics: Metrics
    ):
        self._engine, self._tokenizer, self._settings = engine, tokenizer, settings
        self._metrics = metrics
        page, script = (
            files("llama_jax.serving").joinpath(name).read_text("utf-8")
            for name in ("page.html", "markdown.js")
        )
        self._page = page.replace('<script src="markdown.js">', f"<script>\n{script}")
        self._no_chats = None  # why there are none
        try:
            tokenizer.encode_chat([{"role": "user", "content": "a"}])
        except InputError as error:
            self._no_chats = "this model has no chat format: use /v1/completions"
            if tokenizer.template is not None:
                self._no_chats = str(error)
                _log.warning("no chats are answered: %s", error)
        self._about = {
            "id": settings.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "llama_jax",
            "context": engine.context,
            "max_tokens": settings.max_tokens,
            "chat": self._no_chats is None,
        }

    async def page(self, http: HttpRequest) -> Response:
        return HTMLResponse(self._page, headers=_PAGE_HEADERS)

    async def health(self, http: HttpRequest) -> Response:
        if self._engine.failure is not None:
            return JSONResponse({"status": "failed", "reason": self._engine.failure}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, http: HttpRequest) -> Response:
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def models(self, http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._about]})

    async def model(self, http: HttpRequest) -> Response:
        self._check_model(http.path_params["name"])
        return JSONResponse(self._about)

    async def completions(self, http: HttpRequest) -> Response:
        deadline = self._deadline()
        asked = parse(CompletionRequest, await read_body(http, self._settings.max_body))
        self._check_model(asked.model)
        prompts = await asyncio.to_thread(self._encoded, asked)
        texts = [p if isinstance(p, str) else self._tokenizer.decode(p) for p in asked.prompt]
        echoes = [text if asked.echo else "" for text in texts for _ in range(asked.n)]
        scored = asked.logprobs is not None
        shape = shapes.CompletionFormatter(self._settings.name, scored=scored, echoes=echoes)
        requests = self._requests(asked, prompts, _USUAL_TOKENS, asked.echo and scored)
        wishes = OutputOptions(asked.stop, scored, prompt_only=asked.max_tokens == 0)
        answer = self._answer(http, requests, wishes, deadline)
        return await respond(http, asked, answer, shape, sum(map(len, prompts)))

    async def chat(self, http: HttpRequest) -> Response:
        deadline = self._deadline()
        asked = parse(ChatRequest, await read_body(http, self._settings.max_body))
        self._check_model(asked.model)
        if self._no_chats is not None:
            raise RequestError(400, self._no_chats)
        try:
            prompt = await asyncio.to_thread(self._tokenizer.encode_chat, asked.messages)
        except InputError as error:
            raise RequestError(400, str(error), param="messages") from error
        shape = shapes.ChatFormatter(self._settings.name, scored=asked.logprobs, n=asked.n)
        requests = self._requests(asked, [prompt], None, False)
        answer = self._answer(http, requests, OutputOptions(asked.stop, asked.logprobs), deadline)
        return await respond(http, asked, answer, shape, len(prompt))

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._settings.timeout

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._settings.name):
            message = f"there is no model {name[:200]!r} here: the one served is"
            message += f" {self._settings.name!r}"
            raise RequestError(404, message, param="model", code="model_not_found")

    def _encoded(self, asked: CompletionRequest) -> list[list[int]]:
        prompts = []
        for prompt in asked.prompt:
            if isinstance(prompt, str):
                prompt = prompt_ids(self._tokenizer, prompt, parse_special=asked.parse_special)
            else:
                check_prompt(prompt, self._tokenizer.n_vocab)
            prompts.append(prompt)
        return prompts

    def _requests(
        self, asked: GenerationRequest, prompts: list[list[int]], usual: int | None, scores: bool
    ) -> list[Request]:
        seed = secrets.randbits(31) if asked.seed is None else asked.seed
        limit, context = self._settings.max_tokens, self._engine.context
        requests = []
        for prompt in prompts:
            room = new_tokens(
                asked.max_tokens, usual, prompt=len(prompt), context=context, limit=limit
            )
            request = Request(
                prompt=tuple(prompt),
                max_new_tokens=max(1, room),
                sampling=asked.sampling(),
                end_ids=frozenset() if asked.ignore_eos else self._tokenizer.end_ids,
                top_logprobs=asked.n_top() or 0,
                logprobs=asked.n_top() is not None,
                prompt_logprobs=scores,
            )
            requests += [request._replace(seed=(seed + i) % 2**31) for i in range(asked.n)]
        return requests

    def _answer(
        self, http: HttpRequest, requests: Sequence[Request], wishes: OutputOptions, deadline: float
    ) -> ResponseStream:
        begun, route = time.monotonic(), http.scope["route"].path

        def first_token() -> None:
            self._metrics.first_token(route, time.monotonic() - begun)

        return ResponseStream(
            self._engine, self._tokenizer, requests, wishes,
            deadline=deadline, first_token=first_token,
        )  # fmt: skip


def build_app(engine: Engine, tokenizer: Tokenizer, settings: ServerSettings) -> Starlette:
    """Returns the server as an ASGI application.

    Args:
        engine: makes the tokens.
        tokenizer: of its model.
        settings: what is allowed.
    """
    metrics = Metrics(engine, settings.copy_bandwidth)
    do = _Endpoints(engine, tokenizer, settings, metrics)
    routes = [
        Route("/", do.page),
        Route("/health", do.health),
        Route("/metrics", do.metrics),
        Route("/v1/models", do.models),
        Route("/v1/models/{name:path}", do.model),
        Route("/v1/completions", do.completions, methods=["POST"]),
        Route("/v1/chat/completions", do.chat, methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(
                RequestGuard, api_key=settings.api_key, hosts=settings.hosts, metrics=metrics
            )
        ],
        exception_handlers=EXCEPTION_HANDLERS,
    )


def bind_socket(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound, and does not take connections yet.

    Raises:
        InputError: the address can't be had.
    """
    bound = None
    try:
        # The port is given to bind: getaddrinfo would take one too large for another.
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
            f"{host}, port {port}, can't be listened on ({error}): give another --host or --port"
        ) from error
    return bound


def startup_message(bound: socket.socket, settings: ServerSettings) -> str:
    """Returns what to tell whoever started the server: where it is, and who can use it."""
    host, port = bound.getsockname()[:2]
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    said = f"{settings.name} is served at http://{place} (a page) and http://{place}/v1"
    if settings.api_key is None and not ipaddress.ip_address(host).is_loopback:
        said += "\nwarning: there is no key: everybody who reaches this address can use the model"
    return said


def create_server(app: Starlette) -> Server:
    """Returns the server that runs `app`: `run(sockets=[bind_socket(…)])`."""
    return Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,  # its own would close the handlers that others have
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=_GRACE,
        )
    )


def serve(app: Starlette, bound: socket.socket) -> None:
    """Answers requests until SIGTERM or SIGINT; what is being made then gets some time to end."""
    # uvicorn hands the signal on when it has ended, to whoever had it before.
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        create_server(app).run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
