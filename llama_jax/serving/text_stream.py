"""Converts the engine's events for one HTTP request to increments of text."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llama_jax.inference.detokenize import Detokenizer
from llama_jax.inference.engine.engine import Engine
from llama_jax.inference.engine.requests import (
    Event,
    GeneratedToken,
    PromptDone,
    Request,
    RequestEnded,
)
from llama_jax.inference.stop_strings import StopStrings
from llama_jax.serving.openai_requests import RequestError, engine_error, shutdown_error
from llama_jax.tokenizer.tokenizer import Tokenizer

_MIN_LOGPROB = -9999.0  # JSON has no infinity


class TokenLogprobs(NamedTuple):
    """A token with its log-probability and its alternatives, as clients receive them."""

    text: str
    # Characters of the generated text before this token; for a prompt token, of the prompt.
    text_offset: int
    logprob: float | None  # None: the first token of a prompt
    top: tuple[tuple[str, float], ...]  # the most likely tokens, most likely first


@dataclass
class TextDelta:
    """The increment of one choice since its previous delta."""

    index: int
    text: str = ""
    tokens: list[TokenLogprobs] = field(default_factory=list)  # if requested
    prompt_tokens: list[TokenLogprobs] = field(default_factory=list)  # first delta, if requested
    finish_reason: str | None = None  # in the last delta: stop or length

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens or self.prompt_tokens or self.finish_reason)


class OutputOptions(NamedTuple):
    """The output that a client requests for each choice."""

    stop_strings: Sequence[str] = ()  # each of them ends the text
    with_logprobs: bool = False  # tokens carry their log-probabilities
    prompt_only: bool = False  # generate no tokens, only score the prompt


class _Choice:
    """One generated text of a request."""

    def __init__(self, tokenizer: Tokenizer, request: Request, options: OutputOptions):
        self._tokenizer, self._request, self._options = tokenizer, request, options
        self._detokenizer = Detokenizer(tokenizer, request.prompt)
        self._stops = StopStrings(options.stop_strings)
        self._n_characters = 0  # detokenized
        self._n_released = 0  # characters that the stop strings released
        self._held_tokens: list[TokenLogprobs] = []  # tokens whose text is held back
        self.n_generated = 0
        self.ended = False

    def handle_event(self, delta: TextDelta, event: Event) -> None:
        """Adds the content of `event` to `delta`.

        Raises:
            RequestError: the engine has failed, or is shutting down.
        """
        if isinstance(event, PromptDone):
            delta.prompt_tokens += self._prompt_tokens(event.prompt_logprobs)
            if self._options.prompt_only:
                self.finish(delta, "length")
        elif isinstance(event, GeneratedToken):
            self.n_generated += 1
            if self._options.with_logprobs:
                token = self._token_logprobs(self._detokenizer, event, self._n_characters)
                self._held_tokens.append(token)
            self._add_text(delta, self._detokenizer.add(event.id))
            if self._stops.stopped:
                self.finish(delta, "stop")
        elif event.reason == "error":
            raise engine_error(event.message)
        elif event.reason == "cancelled":
            raise shutdown_error()
        elif event.reason == "constraint":
            raise RequestError(400, event.message, param="response_format")
        else:
            self.finish(delta, event.reason)

    def finish(self, delta: TextDelta, reason: str) -> None:
        """Ends the text: adds the text and the tokens that were held back, and the reason."""
        if not self._stops.stopped:
            self._add_text(delta, self._detokenizer.flush())
            reason = "stop" if self._stops.stopped else reason
            rest = self._stops.flush()
            delta.text += rest
            self._n_released += len(rest)
        # The response contains no stop string, so it contains none of its tokens either.
        delta.tokens += [
            token
            for token in self._held_tokens
            if not self._stops.stopped or token.text_offset < self._n_released
        ]
        delta.finish_reason = reason
        self.ended = True

    def _add_text(self, delta: TextDelta, text: str) -> None:
        self._n_characters += len(text)
        released = self._stops.add(text)
        self._n_released += len(released)
        delta.text += released
        n = sum(token.text_offset < self._n_released for token in self._held_tokens)
        delta.tokens += self._held_tokens[:n]
        self._held_tokens = self._held_tokens[n:]

    def _prompt_tokens(self, logprobs: Sequence[GeneratedToken]) -> list[TokenLogprobs]:
        """Returns the tokens of the prompt; all but the first carry log-probabilities."""
        if not self._request.prompt_logprobs:
            return []
        first, *others = self._request.prompt
        detokenizer = Detokenizer(self._tokenizer)
        offset = len(detokenizer.add(first))
        tokens = [TokenLogprobs(self._tokenizer.decode([first]), 0, None, ())]
        for token_id, token in zip(others, logprobs, strict=True):
            token = token._replace(id=token_id)
            tokens.append(self._token_logprobs(detokenizer, token, offset))
            offset += len(detokenizer.add(token_id))
        return tokens

    def _token_logprobs(
        self, detokenizer: Detokenizer, token: GeneratedToken, text_offset: int
    ) -> TokenLogprobs:
        top = tuple(
            (detokenizer.token_text(token_id), max(_MIN_LOGPROB, logprob))
            for token_id, logprob in token.top
        )
        logprob = max(_MIN_LOGPROB, token.logprob)
        return TokenLogprobs(detokenizer.token_text(token.id), text_offset, logprob, top)


class ResponseStream:
    """The choices of one HTTP request while the engine generates them. Always call `close`.

    Args:
        engine: generates the tokens.
        tokenizer: of the model.
        requests: one for each choice.
        options: apply to every choice.
        deadline: time of the event loop at which unfinished texts end [s].
        on_first_token: called once, when the first token arrives.

    Raises:
        QueueFull: the queue is full; the engine accepts none of the requests.
        EngineStopped: the engine has failed or is closed.
        InputError: one request is invalid; the engine accepts none of them.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        options: OutputOptions,
        *,
        deadline: float,
        on_first_token: Callable[[], None],
    ):
        self._loop = asyncio.get_running_loop()
        self._events = asyncio.Queue[tuple[int, Event]]()
        self._choices = [_Choice(tokenizer, request, options) for request in requests]
        self._deadline, self._on_first_token = deadline, on_first_token
        self._tickets = engine.submit(requests, self._deliver)

    @property
    def n_generated(self) -> int:
        """Tokens generated so far, of all choices."""
        return sum(choice.n_generated for choice in self._choices)

    async def deltas(self) -> AsyncIterator[list[TextDelta]]:
        """Yields the text that arrived since the last yield: at most one delta for each choice.

        Raises:
            RequestError: status 504: no token arrived before the deadline; 500 or 503: the engine
                has failed or is shutting down.
        """
        has_tokens = False
        while not all(choice.ended for choice in self._choices):
            deltas: dict[int, TextDelta] = {}
            try:
                async with asyncio.timeout_at(self._deadline):
                    events = [await self._events.get()]
                while not self._events.empty():
                    events.append(self._events.get_nowait())
            except TimeoutError:
                events = []
                self._end_at_deadline(deltas)
            for index, event in events:
                choice = self._choices[index]
                if not choice.ended:
                    delta = deltas.setdefault(index, TextDelta(index))
                    if isinstance(event, PromptDone) and event.prompt_logprobs:
                        # Detokenizing 8,192 tokens with 20 alternatives each takes a second.
                        await asyncio.to_thread(choice.handle_event, delta, event)
                    else:
                        choice.handle_event(delta, event)
                    if choice.ended and not isinstance(event, RequestEnded):  # the engine continues
                        self._tickets[index].cancel()
            if not has_tokens and self.n_generated:
                self._on_first_token()
                has_tokens = True
            if non_empty := [delta for delta in deltas.values() if delta]:
                yield non_empty

    def close(self) -> None:
        """Cancels the requests that have not ended."""
        for choice, ticket in zip(self._choices, self._tickets, strict=True):
            if not choice.ended:
                ticket.cancel()

    def _deliver(self, index: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop closed before the engine
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    def _end_at_deadline(self, deltas: dict[int, TextDelta]) -> None:
        if not self.n_generated:
            raise RequestError(
                504,
                "the model generated no token within the time limit: try again later",
                code="timeout",
            )
        for index, choice in enumerate(self._choices):
            if not choice.ended:
                choice.finish(deltas.setdefault(index, TextDelta(index)), "length")
                self._tickets[index].cancel()
