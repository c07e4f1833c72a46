"""Formats responses as OpenAI's API does: complete, or as the chunks of a stream.

Source: OpenAI's API reference, Completions, Chat Completions and their streaming.
"""

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_jax import __version__
from llama_jax.serving.openai_requests import RequestError
from llama_jax.serving.text_stream import TextDelta, TokenLogprobs
from llama_jax.serving.tool_calls import CallDelta, ToolCallParser

Json = dict[str, Any]


def error_body(error: RequestError) -> Json:
    """Returns the body of an error response."""
    types = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    default = "invalid_request_error" if error.status < 500 else "server_error"
    return {
        "error": {
            "message": error.message,
            "type": types.get(error.status, default),
            "param": error.param,
            "code": error.code,
        }
    }


def format_event(content: Json) -> str:
    """Returns one server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def token_usage(n_prompt: int, n_generated: int) -> Json:
    """Returns the token counts of a response."""
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_generated,
        "total_tokens": n_prompt + n_generated,
    }


class CompletionFormatter:
    """Formats responses of /v1/completions.

    Args:
        model: its name.
        with_logprobs: whether the response contains log-probabilities.
        echoes: for each choice, the prompt that its text starts with; '' without echo.
    """

    def __init__(self, model: str, *, with_logprobs: bool, echoes: Sequence[str]):
        self._header = _header("cmpl", "text_completion", model)
        self._with_logprobs, self._echoes = with_logprobs, echoes

    def full_response(self, texts: Sequence[TextDelta], usage: Json) -> Json:
        """Returns the body of a response; each element of `texts` is a complete choice."""
        choices = [self._choice(text, with_echo=True) for text in texts]
        return self._header | {"choices": choices, "usage": usage}

    def first_chunks(self) -> Iterator[Json]:
        """Yields the chunks that precede all generated text."""
        for index, echo in enumerate(self._echoes):
            # With log-probabilities, `chunks` sends the prompt, once its tokens are scored.
            if echo and not self._with_logprobs:
                choice = self._choice(TextDelta(index, echo), with_echo=False)
                yield self._header | {"choices": [choice]}

    def chunks(self, delta: TextDelta) -> Iterator[Json]:
        """Yields the chunks of one delta."""
        choice = self._choice(delta, with_echo=bool(delta.prompt_tokens))
        yield self._header | {"choices": [choice]}

    def usage_chunk(self, usage: Json) -> Json:
        """Returns the last chunk of a stream, with the token counts."""
        return self._header | {"choices": [], "usage": usage}

    def _choice(self, delta: TextDelta, with_echo: bool) -> Json:
        echo = self._echoes[delta.index] if with_echo else ""
        return {
            "index": delta.index,
            "text": echo + delta.text,
            "logprobs": self._logprobs(delta) if self._with_logprobs else None,
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, delta: TextDelta) -> Json:
        tokens = [*delta.prompt_tokens, *delta.tokens]
        echo_length = len(self._echoes[delta.index])
        prompt_offsets = [token.text_offset for token in delta.prompt_tokens]
        offsets = [token.text_offset + echo_length for token in delta.tokens]
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_alternatives(token) for token in tokens],
            "text_offset": prompt_offsets + offsets,
        }


def _alternatives(token: TokenLogprobs) -> Mapping[str, float] | None:
    """Returns the log-probabilities of the most likely tokens and of `token`, by their text."""
    if token.logprob is None:
        return None
    # Reversed twice: if several tokens have the same text, the most likely one remains.
    top = dict(reversed(dict(reversed(token.top)).items()))
    return top if token.text in top else top | {token.text: token.logprob}


class ChatFormatter:
    """Formats responses of /v1/chat/completions.

    Args:
        model: its name.
        with_logprobs: whether the response contains log-probabilities.
        n: number of choices.
        parsers: find the calls of tools, one for each choice; () if the model may call none.
    """

    def __init__(
        self, model: str, *, with_logprobs: bool, n: int, parsers: Sequence[ToolCallParser] = ()
    ):
        self._with_logprobs, self._n, self._parsers = with_logprobs, n, parsers
        self._header = _header("chatcmpl", "chat.completion", model)

    def full_response(self, texts: Sequence[TextDelta], usage: Json) -> Json:
        """Returns the body of a response; each element of `texts` is a complete choice."""
        choices = [
            {
                "index": text.index,
                "message": self._message(text),
                "logprobs": self._logprobs(text),
                "finish_reason": self._finish_reason(text),
            }
            for text in texts
        ]
        return self._header | {"choices": choices, "usage": usage}

    def first_chunks(self) -> Iterator[Json]:
        """Yields the chunks that precede all generated text."""
        for index in range(self._n):
            content = {"role": "assistant", "content": "", "refusal": None}
            yield self._chunk(TextDelta(index), content)

    def chunks(self, delta: TextDelta) -> Iterator[Json]:
        """Yields the chunks of one delta: its text, then the reason why the text ended."""
        content, calls = self._separate_calls(delta)
        update: Json = {"content": content} if content or not calls else {}
        if calls:
            update["tool_calls"] = [_call_entry(call) for call in calls]
        if content or calls or delta.tokens:
            yield self._chunk(TextDelta(delta.index, content, delta.tokens), update)
        if delta.finish_reason:
            reason = self._finish_reason(delta)
            yield self._chunk(TextDelta(delta.index, finish_reason=reason), {})

    def _message(self, text: TextDelta) -> Json:
        content, calls = self._separate_calls(text)
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            entries = [_call_entry(call) for call in calls]
            for entry in entries:
                del entry["index"]
            message |= {"content": content or None, "tool_calls": entries}
        return message

    def _separate_calls(self, delta: TextDelta) -> tuple[str, list[CallDelta]]:
        """Returns the content of a delta, and the increments of calls of tools."""
        if not self._parsers:
            return delta.text, []
        content, calls = self._parsers[delta.index].add(delta.text)
        if delta.finish_reason:
            content += self._parsers[delta.index].finish()
        return content, calls

    def _finish_reason(self, delta: TextDelta) -> str | None:
        called = self._parsers and self._parsers[delta.index].n_calls
        return "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason

    def usage_chunk(self, usage: Json) -> Json:
        """Returns the last chunk of a stream, with the token counts."""
        return self._header | {"object": "chat.completion.chunk", "choices": [], "usage": usage}

    def _chunk(self, delta: TextDelta, content: Json) -> Json:
        choice = {
            "index": delta.index,
            "delta": content,
            "logprobs": self._logprobs(delta) if delta.tokens else None,
            "finish_reason": delta.finish_reason,
        }
        return self._header | {"object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, delta: TextDelta) -> Json | None:
        if not self._with_logprobs:
            return None
        content = [
            _token_entry(token.text, token.logprob)
            | {"top_logprobs": [_token_entry(text, logprob) for text, logprob in token.top]}
            for token in delta.tokens
        ]
        return {"content": content, "refusal": None}


def _call_entry(call: CallDelta) -> Json:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {
        "index": call.index,
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _token_entry(token: str, logprob: float | None) -> Json:
    # A token that is a part of a character decodes to U+FFFD: its bytes are unknown here.
    known = "\N{REPLACEMENT CHARACTER}" not in token
    return {"token": token, "logprob": logprob, "bytes": list(token.encode()) if known else None}


def _header(prefix: str, kind: str, model: str) -> Json:
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"llama_jax-{__version__}",
    }
