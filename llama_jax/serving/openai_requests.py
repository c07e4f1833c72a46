"""What clients of OpenAI's API send, checked: each wrong request has its sentence.

Source: OpenAI's API reference, Completions and Chat Completions.
"""

from typing import Annotated, Any, TypeVar

import pydantic_core
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from llama_jax.config.validation import first_problem
from llama_jax.inference.sampling import Sampling
from llama_jax.tokenizer.chat import Message

MAX_CHOICES = 128  # texts that one request may ask for
_MAX_STOPS = 16
_MAX_STOP_LENGTH = 256

# Fields that don't change what is answered.
_IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_retention", "prediction"),
}
# Fields that would, and are not supported: the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
}


class RequestError(Exception):
    """A request that gets no answer: its status, one sentence, and the field that is wrong."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def shutdown_error() -> RequestError:
    """Returns what those are told who wait when the server ends."""
    return RequestError(503, "the server is shutting down", code="shutting_down")


def engine_error(failure: str) -> RequestError:
    """Returns what all requests get after the engine has failed."""
    return RequestError(500, f"the engine has failed: {failure}", code="engine_failed")


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """Returns one or several prompts as several."""

    def numbers(value: Any) -> bool:
        return isinstance(value, list) and all(type(i) is int for i in value)

    if isinstance(value, str):
        return [value]
    if value and numbers(value):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value):
            return value
        if all(numbers(one) and one for one in value):
            return value
    raise ValueError(
        "prompt must be a text, a list of texts, a list of token ids, or a list of such lists,"
        " none of them empty"
    )


def _stops(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(one, str) and one for one in values):
        raise ValueError("stop must be a text or a list of texts, none of them empty")
    if len(values) > _MAX_STOPS or any(len(one) > _MAX_STOP_LENGTH for one in values):
        raise ValueError(
            f"stop may hold {_MAX_STOPS} texts of {_MAX_STOP_LENGTH} characters at most"
        )
    return values


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError("messages must be a list of at least one message")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{place} must be an object with a role and content")
    if message.get("tool_calls") or message.get("function_call"):
        raise ValueError(f"{place} holds calls of tools, which are not supported")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                raise ValueError(f"{place}.content may hold parts of text only")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{place}.content must be a text or a list of parts of text")
    role = "system" if message["role"] == "developer" else message["role"]
    return Message(role=role, content=content)


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False  # ignored: pads chunks to one length


class GenerationRequest(BaseModel):
    """What both kinds of request say."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    stream: bool = False
    stream_options: _StreamOptions | None = None
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _options_of_a_stream(self):
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self

    def sampling(self) -> Sampling:
        """Returns how tokens are drawn."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        names += ("presence_penalty", "frequency_penalty")
        return Sampling(**{name: getattr(self, name) for name in names})

    def n_top(self) -> int | None:
        """Returns how many alternatives each token carries; None where no logprob is wanted."""
        raise NotImplementedError

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts)]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False
    parse_special: bool = True  # llama.cpp's name: texts of special tokens in a prompt give these

    @model_validator(mode="after")
    def _something_to_do(self):
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1 (0 only together with echo)")
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise ValueError(
                f"{len(self.prompt)} prompts with n={self.n} are more than the {MAX_CHOICES} texts"
                " that one request may ask for"
            )
        return self

    def n_top(self) -> int | None:
        """Returns how many alternatives each token carries; None where no logprob is wanted."""
        return self.logprobs


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Any], BeforeValidator(_messages)]  # of Message
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @model_validator(mode="after")
    def _fields_that_agree(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
            self.max_tokens = self.max_completion_tokens
        return self

    def n_top(self) -> int | None:
        """Returns how many alternatives each token carries; None where no logprob is wanted."""
        return self.top_logprobs if self.logprobs else None


Kind = TypeVar("Kind", bound=GenerationRequest)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """Returns the request in a body of JSON; null stands for a field's default.

    Raises:
        RequestError: with status 400, what is wrong with it.
    """
    try:
        content = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise RequestError(400, "the body must be a JSON object")
    content = {name: value for name, value in content.items() if value is not None}
    for name, neutral in _REFUSED.items():
        if name in content and content.pop(name) not in neutral:
            allowed = " or ".join(map(repr, neutral))
            hint = f": leave it out, or give {allowed}" if neutral else ": leave it out"
            raise RequestError(400, f"{name} is not supported{hint}", param=name)
    content = {name: value for name, value in content.items() if name not in _IGNORED}
    try:
        request = kind.model_validate(content)
        request.sampling()
    except ValidationError as error:
        problem = first_problem(error)
        if problem.is_rule:  # the messages of the validators above name the field
            message = problem.message
        elif problem.is_unknown:
            message = f"{problem.key} is not a field of this request"
        else:
            message = problem.sentence()
        raise RequestError(400, message, param=problem.key or None) from error
    return request


def check_prompt(ids: list[int], n_vocab: int) -> None:
    """Checks that the ids of a prompt are tokens.

    Raises:
        RequestError: with status 400, one is not.
    """
    strange = next((i for i in ids if not 0 <= i < n_vocab), None)
    if strange is not None:
        message = f"token {strange} of the prompt is outside the model's {n_vocab} tokens"
        raise RequestError(400, message, param="prompt")


def new_tokens(
    asked: int | None, usual: int | None, *, prompt: int, context: int, limit: int
) -> int:
    """Returns how many tokens to make at most.

    Args:
        asked: what the request says.
        usual: what is made where it says nothing; None for all that there is room for.
        prompt: length of the prompt [tokens].
        context: the longest prompt and output together [tokens].
        limit: of the output [tokens].

    Raises:
        RequestError: with status 400, the prompt leaves too little room, or the request asks for
            more than `limit`.
    """
    room = context - prompt
    if room < 1 or (asked or 0) > room:
        said = f" and max_tokens of {asked} don't fit" if asked else " doesn't fit"
        raise RequestError(
            400,
            f"a prompt of {prompt} tokens{said} the context of {context} tokens",
            param="max_tokens" if room > 0 else "prompt",
            code="context_length_exceeded",
        )
    if (asked or 0) > limit:
        message = f"max_tokens must be at most {limit} on this server, not {asked}"
        raise RequestError(400, message, param="max_tokens")
    return min(room, limit, usual or limit) if asked is None else asked
