"""The HTTP server: OpenAI's API for the engine, a web page and metrics."""

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
from llama_jax.inference.sampling import Sampling
from llama_jax.serving.connections import IDLE_SECONDS, Server
from llama_jax.serving.metrics import CONTENT_TYPE, Metrics
from llama_jax.serving.middleware import EXCEPTION_HANDLERS, AllowedHosts, RequestGuard, read_body
from llama_jax.serving.openai_requests import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    RequestError,
    check_ids,
    max_new_tokens,
    parse_request,
)
from llama_jax.serving.openai_responses import ChatFormatter, CompletionFormatter
from llama_jax.serving.sse import respond
from llama_jax.serving.text_stream import OutputOptions, ResponseStream
from llama_jax.tokenizer.tokenizer import Tokenizer

_log = logging.getLogger("uvicorn.error")

_DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as in OpenAI's API
_SHUTDOWN_GRACE_SECONDS = 20  # after SIGTERM, for the requests that are running
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline';"
    " script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class ServerSettings(NamedTuple):
    """Name of the model, access rules and limits of the server.

    Attributes:
        name: of the model.
        api_key: None: requests need no key.
        hosts: that requests may name, if there is no key.
        max_tokens: maximum length of one output [tokens].
        max_body: maximum length of a request's body [bytes].
        timeout: after which a request ends [s].
        copy_bandwidth: of the machine [bytes/s], for /metrics.
    """

    name: str
    api_key: str | None = None
    hosts: AllowedHosts = AllowedHosts()
    max_tokens: int = 4096
    max_body: int = 2**21
    timeout: float = 600.0
    copy_bandwidth: float | None = None


class _Endpoints:
    """The functions that answer the routes."""

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
        self._no_chat_reason = None  # None: the model supports chats
        try:
            tokenizer.encode_chat([{"role": "user", "content": "a"}])
        except InputError as error:
            self._no_chat_reason = "this model has no chat format: use /v1/completions"
            if tokenizer.template is not None:
                self._no_chat_reason = str(error)
                _log.warning("the server rejects chat requests: %s", error)
        self._model_info = {
            "id": settings.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "llama_jax",
            "context": engine.context,
            "max_tokens": settings.max_tokens,
            "chat": self._no_chat_reason is None,
        }

    async def page(self, http: HttpRequest) -> Response:
        return HTMLResponse(self._page, headers=_PAGE_HEADERS)

    async def health(self, http: HttpRequest) -> Response:
        if self._engine.failure is not None:
            return JSONResponse({"status": "failed", "reason": self._engine.failure}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, http: HttpRequest) -> Response:
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def models(self, http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_info]})

    async def model(self, http: HttpRequest) -> Response:
        self._check_model(http.path_params["name"])
        return JSONResponse(self._model_info)

    async def completions(self, http: HttpRequest) -> Response:
        deadline = self._deadline()
        request = parse_request(CompletionRequest, await read_body(http, self._settings.max_body))
        self._check_model(request.model)
        prompts = await asyncio.to_thread(self._encode_prompts, request)
        texts = [p if isinstance(p, str) else self._tokenizer.decode(p) for p in request.prompt]
        echoes = [text if request.echo else "" for text in texts for _ in range(request.n)]
        with_logprobs = request.logprobs is not None
        formatter = CompletionFormatter(
            self._settings.name, with_logprobs=with_logprobs, echoes=echoes
        )
        engine_requests = self._engine_requests(
            request, prompts, _DEFAULT_MAX_TOKENS, prompt_logprobs=request.echo and with_logprobs
        )
        options = OutputOptions(request.stop, with_logprobs, prompt_only=request.max_tokens == 0)
        stream = self._submit(http, engine_requests, options, deadline)
        return await respond(http, request, stream, formatter, sum(map(len, prompts)))

    async def chat(self, http: HttpRequest) -> Response:
        deadline = self._deadline()
        request = parse_request(ChatRequest, await read_body(http, self._settings.max_body))
        self._check_model(request.model)
        if self._no_chat_reason is not None:
            raise RequestError(400, self._no_chat_reason)
        try:
            prompt = await asyncio.to_thread(self._tokenizer.encode_chat, request.messages)
        except InputError as error:
            raise RequestError(400, str(error), param="messages") from error
        formatter = ChatFormatter(self._settings.name, with_logprobs=request.logprobs, n=request.n)
        engine_requests = self._engine_requests(request, [prompt], None, prompt_logprobs=False)
        options = OutputOptions(request.stop, request.logprobs)
        stream = self._submit(http, engine_requests, options, deadline)
        return await respond(http, request, stream, formatter, len(prompt))

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._settings.timeout

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._settings.name):
            message = (
                f"there is no model {name[:200]!r} on this server: use {self._settings.name!r}"
            )
            raise RequestError(404, message, param="model", code="model_not_found")

    def _encode_prompts(self, request: CompletionRequest) -> list[list[int]]:
        prompts = []
        for prompt in request.prompt:
            if isinstance(prompt, str):
                prompt = prompt_ids(self._tokenizer, prompt, parse_special=request.parse_special)
            else:
                check_ids(prompt, self._tokenizer.n_vocab, "the prompt")
            prompts.append(prompt)
        return prompts

    def _engine_requests(
        self,
        request: GenerationRequest,
        prompts: list[list[int]],
        default_max_tokens: int | None,
        *,
        prompt_logprobs: bool,
    ) -> list[Request]:
        """Returns the n requests of each prompt; number i has the seed `seed + i`."""
        seed = secrets.randbits(31) if request.seed is None else request.seed
        limit, context = self._settings.max_tokens, self._engine.context
        check_ids(request.logit_bias, self._tokenizer.n_vocab, "logit_bias")
        engine_requests = []
        for prompt in prompts:
            max_new = max_new_tokens(
                request.max_tokens,
                default_max_tokens,
                n_prompt=len(prompt),
                context=context,
                limit=limit,
            )
            engine_request = Request(
                prompt=tuple(prompt),
                max_new_tokens=max(1, max_new),
                # Without a new token the sampling doesn't matter. Greedy prompts are scored faster.
                sampling=Sampling() if request.max_tokens == 0 else request.sampling(),
                end_ids=frozenset() if request.ignore_eos else self._tokenizer.end_ids,
                top_logprobs=request.n_top_logprobs() or 0,
                logprobs=request.n_top_logprobs() is not None,
                prompt_logprobs=prompt_logprobs,
                logit_bias=tuple(request.logit_bias.items()),
            )
            engine_requests += [
                engine_request._replace(seed=(seed + i) % 2**31) for i in range(request.n)
            ]
        return engine_requests

    def _submit(
        self,
        http: HttpRequest,
        engine_requests: Sequence[Request],
        options: OutputOptions,
        deadline: float,
    ) -> ResponseStream:
        start, route = time.monotonic(), http.scope["route"].path

        def on_first_token() -> None:
            self._metrics.observe_first_token(route, time.monotonic() - start)

        return ResponseStream(
            self._engine, self._tokenizer, engine_requests, options,
            deadline=deadline, on_first_token=on_first_token,
        )  # fmt: skip


def build_app(engine: Engine, tokenizer: Tokenizer, settings: ServerSettings) -> Starlette:
    """Returns the server as an ASGI application.

    Args:
        engine: generates the tokens.
        tokenizer: of the model.
        settings: access rules and limits.
    """
    metrics = Metrics(engine, settings.copy_bandwidth)
    endpoints = _Endpoints(engine, tokenizer, settings, metrics)
    routes = [
        Route("/", endpoints.page),
        Route("/health", endpoints.health),
        Route("/metrics", endpoints.metrics),
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{name:path}", endpoints.model),
        Route("/v1/completions", endpoints.completions, methods=["POST"]),
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
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
