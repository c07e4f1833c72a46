"""The functions that answer the routes of the server."""

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response

from llama_jax.errors import InputError
from llama_jax.inference.complete import prompt_ids
from llama_jax.inference.engine.engine import Engine
from llama_jax.inference.engine.requests import Request
from llama_jax.inference.grammars import GrammarConstraint, Grammars
from llama_jax.inference.sampling import Sampling
from llama_jax.serving.metrics import CONTENT_TYPE, Metrics
from llama_jax.serving.middleware import AllowedHosts, read_body
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
from llama_jax.serving.openai_tools import call_marker, calls_grammar
from llama_jax.serving.sse import respond
from llama_jax.serving.text_stream import OutputOptions, ResponseStream
from llama_jax.serving.token_requests import (
    DetokenizeRequest,
    TokenizeRequest,
    text_with_special,
    token_texts,
)
from llama_jax.serving.tool_calls import ToolCallParser
from llama_jax.tokenizer.chat import Message
from llama_jax.tokenizer.tokenizer import Tokenizer

_log = logging.getLogger("uvicorn.error")

_DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as in OpenAI's API
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


class Endpoints:
    """The functions that answer the routes."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, settings: ServerSettings, metrics: Metrics
    ):
        self._engine, self._tokenizer, self._settings = engine, tokenizer, settings
        self._metrics, self._grammars = metrics, Grammars(tokenizer)
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
        """Answers GET /."""
        return HTMLResponse(self._page, headers=_PAGE_HEADERS)

    async def health(self, http: HttpRequest) -> Response:
        """Answers GET /health."""
        if self._engine.failure is not None:
            return JSONResponse({"status": "failed", "reason": self._engine.failure}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, http: HttpRequest) -> Response:
        """Answers GET /metrics."""
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def models(self, http: HttpRequest) -> Response:
        """Answers GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model_info]})

    async def model(self, http: HttpRequest) -> Response:
        """Answers GET /v1/models/NAME."""
        self._check_model(http.path_params["name"])
        return JSONResponse(self._model_info)

    async def completions(self, http: HttpRequest) -> Response:
        """Answers POST /v1/completions."""
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
            request,
            prompts,
            _DEFAULT_MAX_TOKENS,
            await self._constraint(request),
            prompt_logprobs=request.echo and with_logprobs,
        )
        options = OutputOptions(request.stop, with_logprobs, prompt_only=request.max_tokens == 0)
        stream = self._submit(http, engine_requests, options, deadline)
        return await respond(http, request, stream, formatter, sum(map(len, prompts)))

    async def chat(self, http: HttpRequest) -> Response:
        """Answers POST /v1/chat/completions."""
        deadline = self._deadline()
        request = parse_request(ChatRequest, await read_body(http, self._settings.max_body))
        self._check_model(request.model)
        prompt = await asyncio.to_thread(self._encode_chat, request.messages, request.choice.tools)
        formatter = ChatFormatter(
            self._settings.name,
            with_logprobs=request.logprobs,
            n=request.n,
            parsers=self._tool_parsers(request),
        )
        engine_requests = self._engine_requests(
            request, [prompt], None, await self._constraint(request), prompt_logprobs=False
        )
        options = OutputOptions(request.stop, request.logprobs)
        stream = self._submit(http, engine_requests, options, deadline)
        return await respond(http, request, stream, formatter, len(prompt))

    async def tokenize(self, http: HttpRequest) -> Response:
        """Answers POST /tokenize."""
        request = parse_request(TokenizeRequest, await read_body(http, self._settings.max_body))
        self._check_model(request.model)
        if request.messages is not None:
            ids = await asyncio.to_thread(self._encode_chat, request.messages, request.tools)
        elif request.add_special_tokens:
            text = request.prompt or ""
            ids = await asyncio.to_thread(prompt_ids, self._tokenizer, text, parse_special=True)
        else:
            ids = await asyncio.to_thread(self._tokenizer.parse, request.prompt or "")
        texts = token_texts(self._tokenizer, ids) if request.return_token_strs else None
        context = self._engine.context
        return JSONResponse(
            {"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": texts}
        )

    async def detokenize(self, http: HttpRequest) -> Response:
        """Answers POST /detokenize."""
        request = parse_request(DetokenizeRequest, await read_body(http, self._settings.max_body))
        self._check_model(request.model)
        check_ids(request.tokens, self._tokenizer.n_vocab, "tokens")
        text = await asyncio.to_thread(text_with_special, self._tokenizer, request.tokens)
        return JSONResponse({"prompt": text})

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._settings.timeout

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._settings.name):
            message = (
                f"there is no model {name[:200]!r} on this server: use {self._settings.name!r}"
            )
            raise RequestError(404, message, param="model", code="model_not_found")

    async def _constraint(self, request: GenerationRequest) -> GrammarConstraint | None:
        """Returns the constraint of a request's output; compiling its grammar may take a second."""
        grammar = request.grammar
        if isinstance(request, ChatRequest) and request.choice.required:
            tokenizer = self._tokenizer
            grammar = calls_grammar(request.choice, tokenizer.tool_format(), tokenizer.special)
        if grammar is None:
            return None
        return await asyncio.to_thread(self._grammars.constraint, grammar)

    def _encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> list[int]:
        if self._no_chat_reason is not None:
            raise RequestError(400, self._no_chat_reason)
        try:
            return self._tokenizer.encode_chat(messages, tools)
        except InputError as error:
            raise RequestError(400, str(error), param="messages") from error

    def _tool_parsers(self, request: ChatRequest) -> list[ToolCallParser]:
        """Returns the parsers of the choices; none if the model may call no tool."""
        if not (choice := request.choice).tools:
            return []
        marker = call_marker(self._tokenizer.tool_format(), self._tokenizer.special)
        several = choice.several
        return [ToolCallParser(marker, choice.names, several=several) for _ in range(request.n)]

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
        constraint: GrammarConstraint | None,
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
                engine_request._replace(
                    seed=(seed + i) % 2**31, constraint=constraint and constraint.copy()
                )
                for i in range(request.n)
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
