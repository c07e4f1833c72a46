"""Sends a response: as one JSON body, or as a stream of server-sent events (SSE)."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from llama_jax.serving.openai_requests import GenerationRequest, RequestError
from llama_jax.serving.openai_responses import (
    ChatFormatter,
    CompletionFormatter,
    error_body,
    format_event,
    token_usage,
)
from llama_jax.serving.text_stream import ResponseStream, TextDelta

_T = TypeVar("_T")


async def respond(
    http: Request,
    request: GenerationRequest,
    stream: ResponseStream,
    formatter: CompletionFormatter | ChatFormatter,
    n_prompt: int,
) -> Response:
    """Returns the complete response, or a stream that has started.

    If the client disconnects, the engine stops generating.

    Args:
        http: the HTTP request.
        request: its parsed body.
        stream: the texts that the engine generates.
        formatter: converts the texts to OpenAI's JSON.
        n_prompt: length of all prompts [tokens].

    Raises:
        RequestError: the request fails before the first text.
        ClientDisconnect: the client has disconnected.
    """
    deltas = stream.deltas()
    if request.stream:
        # Wait for the first delta: an error before it can still set the HTTP status.
        first = await _cancel_on_disconnect(http, anext(deltas), stream)
        return _EventStream(_events(first, deltas, request, stream, formatter, n_prompt), stream)
    texts = await _cancel_on_disconnect(http, _collect(deltas), stream)
    usage = token_usage(n_prompt, stream.n_generated)
    return JSONResponse(formatter.full_response(texts, usage))


async def _collect(deltas: AsyncIterator[list[TextDelta]]) -> list[TextDelta]:
    """Returns one delta for each choice, which contains its complete text."""
    texts: dict[int, TextDelta] = {}
    async for batch in deltas:
        for delta in batch:
            text = texts.setdefault(delta.index, TextDelta(delta.index))
            text.text += delta.text
            text.tokens += delta.tokens
            text.prompt_tokens += delta.prompt_tokens
            text.finish_reason = delta.finish_reason
    return [texts[index] for index in sorted(texts)]


async def _cancel_on_disconnect(
    http: Request, generation: Awaitable[_T], stream: ResponseStream
) -> _T:
    """Returns the result of `generation`; closes `stream` on an error or a disconnect."""
    result = asyncio.ensure_future(generation)
    disconnect = asyncio.create_task(_wait_for_disconnect(http))
    try:
        await asyncio.wait({result, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnect
        return result.result()
    except BaseException:
        stream.close()
        raise
    finally:
        result.cancel()
        disconnect.cancel()


async def _wait_for_disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(
    first: list[TextDelta],
    deltas: AsyncIterator[list[TextDelta]],
    request: GenerationRequest,
    stream: ResponseStream,
    formatter: CompletionFormatter | ChatFormatter,
    n_prompt: int,
) -> AsyncIterator[str]:
    """Yields the events of a stream; an error becomes the last event."""
    null_usage = {"usage": None} if request.with_usage else {}
    try:
        for chunk in formatter.first_chunks():
            yield format_event(chunk | null_usage)
        batch: list[TextDelta] | None = first
        while batch:
            for chunk in (chunk for delta in batch for chunk in formatter.chunks(delta)):
                yield format_event(chunk | null_usage)
            batch = await anext(deltas, None)
    except RequestError as error:
        yield format_event(error_body(error))
        return
    if request.with_usage:
        yield format_event(formatter.usage_chunk(token_usage(n_prompt, stream.n_generated)))
    yield "data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """A stream of server-sent events. It closes `stream` when it ends or the client disconnects."""

    def __init__(self, events: AsyncIterator[str], stream: ResponseStream):
        # x-accel-buffering: nginx buffers responses by default, which delays the events.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()
