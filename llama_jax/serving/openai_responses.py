"""Answers in the shapes of OpenAI's API, whole and as the events of a stream.

Source: OpenAI's API reference, Completions, Chat Completions and their streaming.
"""

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_jax import __version__
from llama_jax.serving.openai_requests import RequestError
from llama_jax.serving.text_stream import Piece, TokenLogprobs

Json = dict[str, Any]


def error(refused: RequestError) -> Json:
    """Returns the body that tells why there is no answer."""
    types = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    usual = "invalid_request_error" if refused.status < 500 else "server_error"
    about = {"param": refused.param, "code": refused.code}
    kind = types.get(refused.status, usual)
    return {"error": {"message": refused.message, "type": kind} | about}


def event(content: Json) -> str:
    """Returns one server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def usage(prompt: int, made: int) -> Json:
    """Returns the counts of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


class CompletionFormatter:
    """The shape of /v1/completions.

    Args:
        model: its name.
        scored: whether log-probabilities are told.
        echoes: what stands before each text: the prompts, or nothing.
    """

    def __init__(self, model: str, *, scored: bool, echoes: Sequence[str]):
        self._head = _head("cmpl", "text_completion", model)
        self._scored, self._echoes = scored, echoes

    def whole(self, pieces: Sequence[Piece], counts: Json) -> Json:
        """Returns the answer of all texts, one piece each."""
        return self._head | {"choices": [self._choice(p, True) for p in pieces], "usage": counts}

    def opening(self) -> Iterator[Json]:
        """Yields the parts of a stream before anything is made."""
        for index, echo in enumerate(self._echoes):
            # With log-probabilities the prompt comes with its own, when they are known.
            if echo and not self._scored:
                yield self._head | {"choices": [self._choice(Piece(index, echo), False)]}

    def part(self, piece: Piece) -> Iterator[Json]:
        """Yields the parts of a stream that tell one piece."""
        yield self._head | {"choices": [self._choice(piece, bool(piece.prompt))]}

    def counts(self, counts: Json) -> Json:
        """Returns the last part of a stream."""
        return self._head | {"choices": [], "usage": counts}

    def _choice(self, piece: Piece, with_echo: bool) -> Json:
        echo = self._echoes[piece.index] if with_echo else ""
        return {
            "index": piece.index,
            "text": echo + piece.text,
            "logprobs": self._logprobs(piece) if self._scored else None,
            "finish_reason": piece.reason,
        }

    def _logprobs(self, piece: Piece) -> Json:
        tokens = [*piece.prompt, *piece.tokens]
        shift = len(self._echoes[piece.index])
        made = [token.at + shift for token in piece.tokens]
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_alternatives(token) for token in tokens],
            "text_offset": [token.at for token in piece.prompt] + made,
        }


def _alternatives(token: TokenLogprobs) -> Mapping[str, float] | None:
    """Returns the likely tokens and the one that was made, by their text."""
    if token.logprob is None:
        return None
    made = dict(reversed(token.top))  # of tokens with one text, the most likely stays
    return dict(reversed(made.items())) | (
        {} if token.text in made else {token.text: token.logprob}
    )


class ChatFormatter:
    """The shape of /v1/chat/completions.

    Args:
        model: its name.
        scored: whether log-probabilities are told.
        n: number of texts.
    """

    def __init__(self, model: str, *, scored: bool, n: int):
        self._model, self._scored, self._n = model, scored, n
        self._head = _head("chatcmpl", "chat.completion", model)

    def whole(self, pieces: Sequence[Piece], counts: Json) -> Json:
        """Returns the answer of all texts, one piece each."""
        choices = [
            {
                "index": piece.index,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": self._logprobs(piece),
                "finish_reason": piece.reason,
            }
            for piece in pieces
        ]
        return self._head | {"choices": choices, "usage": counts}

    def opening(self) -> Iterator[Json]:
        """Yields the parts of a stream before anything is made."""
        for index in range(self._n):
            delta = {"role": "assistant", "content": "", "refusal": None}
            yield self._chunk(Piece(index), delta)

    def part(self, piece: Piece) -> Iterator[Json]:
        """Yields the parts of a stream that tell one piece."""
        if piece.text or piece.tokens:
            said = Piece(piece.index, piece.text, piece.tokens)
            yield self._chunk(said, {"content": piece.text})
        if piece.reason:
            yield self._chunk(Piece(piece.index, reason=piece.reason), {})

    def counts(self, counts: Json) -> Json:
        """Returns the last part of a stream."""
        return self._head | {"object": "chat.completion.chunk", "choices": [], "usage": counts}

    def _chunk(self, piece: Piece, delta: Json) -> Json:
        choice = {
            "index": piece.index,
            "delta": delta,
            "logprobs": self._logprobs(piece) if piece.tokens else None,
            "finish_reason": piece.reason,
        }
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, piece: Piece) -> Json | None:
        if not self._scored:
            return None
        content = [
            _said(token.text, token.logprob)
            | {"top_logprobs": [_said(text, logprob) for text, logprob in token.top]}
            for token in piece.tokens
        ]
        return {"content": content, "refusal": None}


def _said(token: str, logprob: float | None) -> Json:
    # The bytes of a part of a character are not known here.
    whole = "\N{REPLACEMENT CHARACTER}" not in token
    return {"token": token, "logprob": logprob, "bytes": list(token.encode()) if whole else None}


def _head(prefix: str, kind: str, model: str) -> Json:
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"llama_jax-{__version__}",
    }
