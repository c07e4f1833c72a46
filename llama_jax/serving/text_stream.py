"""What the engine makes for one HTTP request, as pieces of text."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llama_jax.inference.detokenize import Detokenizer, StopStrings
from llama_jax.inference.engine.engine import Engine
from llama_jax.inference.engine.requests import (
    Event,
    GeneratedToken,
    PromptDone,
    Request,
    RequestEnded,
)
from llama_jax.serving.openai_requests import RequestError, engine_error, shutdown_error
from llama_jax.tokenizer.tokenizer import Tokenizer

_LOWEST = -9999.0  # JSON has no infinity


class TokenLogprobs(NamedTuple):
    """A token with its log-probability, as clients see it."""

    text: str
    at: int  # characters of the made text before it; of a prompt's token, of the prompt
    logprob: float | None  # None: the first of a prompt
    top: tuple[tuple[str, float], ...]  # the most likely ones, most likely first


@dataclass
class Piece:
    """What came of one text since its last piece."""

    index: int
    text: str = ""
    tokens: list[TokenLogprobs] = field(default_factory=list)  # where they are asked for
    prompt: list[TokenLogprobs] = field(default_factory=list)  # in the first piece, where asked for
    reason: str | None = None  # in the last piece: stop or length

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens or self.prompt or self.reason)


class OutputOptions(NamedTuple):
    """What is wanted of each text."""

    stops: Sequence[str] = ()  # strings that end it
    scored: bool = False  # tokens with their log-probabilities
    prompt_only: bool = False  # nothing is to be made: the prompt's own log-probabilities


class _Text:
    """One text that is being made."""

    def __init__(self, tokenizer: Tokenizer, request: Request, wishes: OutputOptions):
        self._tokenizer, self._request, self._wishes = tokenizer, request, wishes
        self._made = Detokenizer(tokenizer, request.prompt)
        self._stops = StopStrings(wishes.stops)
        self._at = 0  # characters made
        self._shown = 0  # characters that stop strings let through
        self._waiting: list[TokenLogprobs] = []  # tokens whose text is held back
        self.n_made = 0
        self.ended = False

    def take(self, piece: Piece, event: Event) -> None:
        """Adds to `piece` what `event` brings.

        Raises:
            RequestError: the engine has failed, or is being closed.
        """
        if isinstance(event, PromptDone):
            piece.prompt += self._prompt(event.prompt_logprobs)
            if self._wishes.prompt_only:
                self.end(piece, "length")
        elif isinstance(event, GeneratedToken):
            self.n_made += 1
            if self._wishes.scored:
                self._waiting.append(self._score(self._made, event, self._at))
            self._show(piece, self._made.add(event.id))
            if self._stops.stopped:
                self.end(piece, "stop")
        elif event.reason == "error":
            raise engine_error(event.message)
        elif event.reason == "cancelled":
            raise shutdown_error()
        else:
            self.end(piece, event.reason)

    def end(self, piece: Piece, reason: str) -> None:
        """Adds what is left."""
        if not self._stops.stopped:
            self._show(piece, self._made.flush())
            reason = "stop" if self._stops.stopped else reason
            rest = self._stops.flush()
            piece.text += rest
            self._shown += len(rest)
        # The text of a stop string is not shown: neither are its tokens.
        kept = [t for t in self._waiting if not self._stops.stopped or t.at < self._shown]
        piece.tokens += kept
        piece.reason = reason
        self.ended = True

    def _show(self, piece: Piece, text: str) -> None:
        self._at += len(text)
        shown = self._stops.add(text)
        self._shown += len(shown)
        piece.text += shown
        n = sum(token.at < self._shown for token in self._waiting)
        piece.tokens += self._waiting[:n]
        self._waiting = self._waiting[n:]

    def _prompt(self, scores: Sequence[GeneratedToken]) -> list[TokenLogprobs]:
        """Returns the tokens of the prompt with the scores of all but the first."""
        if not self._request.prompt_logprobs:
            return []
        first, *others = self._request.prompt
        text = Detokenizer(self._tokenizer)
        at = len(text.add(first))
        scored = [TokenLogprobs(self._tokenizer.decode([first]), 0, None, ())]
        for token, score in zip(others, scores, strict=True):
            scored.append(self._score(text, score._replace(id=token), at))
            at += len(text.add(token))
        return scored

    def _score(self, text: Detokenizer, token: GeneratedToken, at: int) -> TokenLogprobs:
        top = tuple((text.token_text(i), max(_LOWEST, logprob)) for i, logprob in token.top)
        return TokenLogprobs(text.token_text(token.id), at, max(_LOWEST, token.logprob), top)


class ResponseStream:
    """The texts of one HTTP request, while they are made. To be closed, whatever happens.

    Args:
        engine: that makes them.
        tokenizer: of the model.
        requests: one a text.
        wishes: what is wanted of each.
        deadline: when texts end as they are, in the time of the event loop [s].
        first_token: is called when the first token is there.

    Raises:
        QueueFull: the queue is full; none is made.
        EngineStopped: the engine has failed, or is closed.
        InputError: the engine refuses one; none is made.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        wishes: OutputOptions,
        *,
        deadline: float,
        first_token: Callable[[], None],
    ):
        self._loop = asyncio.get_running_loop()
        self._events = asyncio.Queue[tuple[int, Event]]()
        self._texts = [_Text(tokenizer, request, wishes) for request in requests]
        self._deadline, self._first_token = deadline, first_token
        self._tickets = engine.submit(requests, self._deliver)

    @property
    def n_made(self) -> int:
        """Tokens made so far."""
        return sum(text.n_made for text in self._texts)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Yields what has come since the last time: at most one piece of each text.

        Raises:
            RequestError: with status 504, nothing was made in time; with 500 or 503, the engine has
                failed or is being closed.
        """
        begun = False
        while not all(text.ended for text in self._texts):
            made: dict[int, Piece] = {}
            try:
                async with asyncio.timeout_at(self._deadline):
                    events = [await self._events.get()]
                while not self._events.empty():
                    events.append(self._events.get_nowait())
            except TimeoutError:
                events = []
                self._give_up(made)
            for index, event in events:
                text = self._texts[index]
                if not text.ended:
                    piece = made.setdefault(index, Piece(index))
                    if isinstance(event, PromptDone) and event.prompt_logprobs:
                        # 8,192 tokens with 20 alternatives each are a second of detokenizing.
                        await asyncio.to_thread(text.take, piece, event)
                    else:
                        text.take(piece, event)
                    if text.ended and not isinstance(event, RequestEnded):  # by a stop string
                        self._tickets[index].cancel()
            if not begun and self.n_made:
                self._first_token()
                begun = True
            if pieces := [piece for piece in made.values() if piece]:
                yield pieces

    def close(self) -> None:
        """Ends what is still being made."""
        for text, ticket in zip(self._texts, self._tickets, strict=True):
            if not text.ended:
                ticket.cancel()

    def _deliver(self, index: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the server has ended before the engine
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    def _give_up(self, made: dict[int, Piece]) -> None:
        if not self.n_made:
            raise RequestError(
                504, "nothing was made within the time limit: try again later", code="timeout"
            )
        for index, text in enumerate(self._texts):
            if not text.ended:
                text.end(made.setdefault(index, Piece(index)), "length")
                self._tickets[index].cancel()
