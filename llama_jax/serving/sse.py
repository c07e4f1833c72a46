"""How a request is answered: whole, or as a stream of server-sent events."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from llama_jax.serving import openai_responses as shapes
from llama_jax.serving.openai_requests import GenerationRequest, RequestError
from llama_jax.serving.text_stream import Piece, ResponseStream

_T = TypeVar("_T")


async def respond(
    http: Request,
    asked: GenerationRequest,
    answer: ResponseStream,
    shape: shapes.CompletionFormatter | shapes.ChatFormatter,
    n_prompt: int,
) -> Response:
    """Returns the answer, whole or as a stream that has begun; a client that leaves ends it.

    Args:
        http: the request as it came.
        asked: the request as it was read.
        answer: the texts that are being made.
        shape: of the answer.
        n_prompt: length of the prompts [tokens].

    Raises:
        RequestError: there is no answer.
        ClientDisconnect: the client has left.
    """
    pieces = answer.pieces()
    if asked.stream:
        # What fails before the first piece still has a status of its own.
        first = await _unless_gone(http, anext(pieces), answer)
        return _Events(_events(first, pieces, asked, answer, shape, n_prompt), answer)
    texts = await _unless_gone(http, _whole(pieces), answer)
    return JSONResponse(shape.whole(texts, shapes.usage(n_prompt, answer.n_made)))


async def _whole(pieces: AsyncIterator[list[Piece]]) -> list[Piece]:
    """Returns one piece for each text."""
    texts: dict[int, Piece] = {}
    async for several in pieces:
        for piece in several:
            text = texts.setdefault(piece.index, Piece(piece.index))
            text.text += piece.text
            text.tokens += piece.tokens
            text.prompt += piece.prompt
            text.reason = piece.reason
    return [texts[index] for index in sorted(texts)]


async def _unless_gone(http: Request, making: Awaitable[_T], answer: ResponseStream) -> _T:
    """Returns what `making` gives, unless it fails or the client leaves: that ends the answer."""
    made, gone = asyncio.ensure_future(making), asyncio.create_task(_gone(http))
    try:
        await asyncio.wait({made, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not made.done():
            raise ClientDisconnect
        return made.result()
    except BaseException:
        answer.close()
        raise
    finally:
        made.cancel()
        gone.cancel()


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(
    first: list[Piece],
    pieces: AsyncIterator[list[Piece]],
    asked: GenerationRequest,
    answer: ResponseStream,
    shape: shapes.CompletionFormatter | shapes.ChatFormatter,
    n_prompt: int,
) -> AsyncIterator[str]:
    """Yields the events of a stream."""
    no_counts = {"usage": None} if asked.with_usage else {}
    try:
        for part in shape.opening():
            yield shapes.event(part | no_counts)
        several: list[Piece] | None = first
        while several:
            for part in (part for piece in several for part in shape.part(piece)):
                yield shapes.event(part | no_counts)
            several = await anext(pieces, None)
    except RequestError as refused:
        yield shapes.event(shapes.error(refused))
        return
    if asked.with_usage:
        yield shapes.event(shape.counts(shapes.usage(n_prompt, answer.n_made)))
    yield "data: [DONE]\n\n"


class _Events(StreamingResponse):
    """A stream of server-sent events; a client that leaves ends the answer."""

    def __init__(self, events: AsyncIterator[str], answer: ResponseStream):
        # nginx would hold the events back.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()
