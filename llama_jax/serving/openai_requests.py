"""Parses and checks the requests of OpenAI's API; an invalid one raises `RequestError`.

Source: OpenAI's API reference, Completions and Chat Completions.
"""

from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

import pydantic_core
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from llama_jax.config.validation import first_problem
from llama_jax.inference.logit_limits import MAX_BIAS
from llama_jax.inference.sampling import Sampling
from llama_jax.serving.openai_formats import output_grammar
from llama_jax.serving.openai_messages import validate_messages
from llama_jax.serving.openai_tools import ToolChoice, choose_tools, validate_tools

MAX_CHOICES = 128  # of one request: prompts × n
_MAX_STOPS = 16
_MAX_STOP_LENGTH = 256  # characters

# Fields that don't change the response.
_IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "prediction"),
}
# Unsupported fields that would change the response: only their neutral values are accepted.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
}


class RequestError(Exception):
    """The server rejects a request or can't complete it.

    Args:
        status: of the HTTP response.
        message: one sentence for the client.
        param: the invalid field of the request.
        code: OpenAI's name of the error, or ours.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def shutdown_error() -> RequestError:
    """Returns the error for requests that are unfinished when the server shuts down."""
    return RequestError(503, "the server is shutting down", code="shutting_down")


def engine_error(failure: str) -> RequestError:
    """Returns the error for every request once the engine has failed."""
    return RequestError(500, f"the engine has failed: {failure}", code="engine_failed")


def _validate_prompts(value: Any) -> list[str] | list[list[int]]:
    """Returns a list of prompts; `value` may also be a single prompt."""

    def is_int_list(value: Any) -> bool:
        return isinstance(value, list) and all(type(i) is int for i in value)

    if isinstance(value, str):
        return [value]
    if value and is_int_list(value):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if all(is_int_list(item) and item for item in value):
            return value
    raise ValueError(
        "prompt must be a string, a list of strings, a list of token ids or a list of such lists,"
        " and no list may be empty"
    )


def _validate_stops(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) and item for item in values):
        raise ValueError("stop must be a non-empty string or a list of non-empty strings")
    if len(values) > _MAX_STOPS or any(len(item) > _MAX_STOP_LENGTH for item in values):
        raise ValueError(
            f"stop may contain at most {_MAX_STOPS} strings, each of at most"
            f" {_MAX_STOP_LENGTH} characters"
        )
    return values


def _validate_logit_bias(value: Any) -> dict[int, float]:
    """Returns the biases by token; JSON has only strings as keys."""

    def is_valid(token: str, bias: Any) -> bool:
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        return token.isdecimal() and is_number and abs(bias) <= MAX_BIAS

    if not isinstance(value, dict) or not all(map(is_valid, value.keys(), value.values())):
        raise ValueError(
            "logit_bias must be an object of token ids with numbers from"
            f" -{MAX_BIAS:.0f} to {MAX_BIAS:.0f}"
        )
    return {int(token): float(bias) for token, bias in value.items()}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False  # ignored: pads all chunks to the same length


class GenerationRequest(BaseModel):
    """The fields that both kinds of request have."""

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
    stop: Annotated[list[str], BeforeValidator(_validate_stops)] = []
    stream: bool = False
    stream_options: _StreamOptions | None = None
    ignore_eos: bool = False
    logit_bias: Annotated[dict[int, float], BeforeValidator(_validate_logit_bias)] = {}

    # The format of the output; the last five are vLLM's.
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    _grammar: str | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _find_grammar(self):
        self._grammar = output_grammar(vars(self))
        if self._grammar is not None and self.ignore_eos:
            raise ValueError("ignore_eos can't be combined with a format of the output")
        return self

    @property
    def grammar(self) -> str | None:
        """The grammar of the output; None if it is free."""
        return self._grammar

    @model_validator(mode="after")
    def _check_stream_options(self):
        if self.stream_options and not self.stream:
            raise ValueError("stream_options requires stream to be true")
        return self

    def sampling(self) -> Sampling:
        """Returns the sampling parameters."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        names += ("presence_penalty", "frequency_penalty")
        return Sampling(**{name: getattr(self, name) for name in names})

    def n_top_logprobs(self) -> int | None:
        """Returns the number of alternatives of each token; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_validate_prompts)]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False
    parse_special: bool = True  # llama.cpp's name: parse special tokens in the prompt's text

    @model_validator(mode="after")
    def _check_output(self):
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1 (0 is allowed only with echo)")
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise ValueError(
                f"{len(self.prompt)} prompts with n={self.n} are {len(self.prompt) * self.n} texts:"
                f" one request may ask for at most {MAX_CHOICES}"
            )
        return self

    def n_top_logprobs(self) -> int | None:
        """Returns the number of alternatives of each token; None: no log-probabilities."""
        return self.logprobs


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Any], BeforeValidator(validate_messages)]  # of Message
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    tools: Annotated[list[Any], BeforeValidator(validate_tools)] = []
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    _choice: ToolChoice = PrivateAttr(default=ToolChoice())

    @property
    def choice(self) -> ToolChoice:
        """The tools that the answer may call."""
        return self._choice

    @model_validator(mode="after")
    def _choose_tools(self):
        several = self.parallel_tool_calls
        self._choice = choose_tools(self.tools, self.tool_choice, several=several)
        if self._choice.tools and self.grammar is not None:
            raise ValueError(
                "tools can't be combined with a format of the output: send tool_choice none, or"
                " leave out the format"
            )
        if self._choice.required and self.ignore_eos:
            raise ValueError("ignore_eos can't be combined with a tool_choice that requires calls")
        return self

    @model_validator(mode="after")
    def _check_related_fields(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs to be true")
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError(
                    "max_tokens and max_completion_tokens differ: send only one of them"
                )
            self.max_tokens = self.max_completion_tokens
        return self

    def n_top_logprobs(self) -> int | None:
        """Returns the number of alternatives of each token; None: no log-probabilities."""
        return self.top_logprobs if self.logprobs else None


Kind = TypeVar("Kind", bound=BaseModel)


def parse_request(kind: type[Kind], body: bytes) -> Kind:
    """Returns the request in a JSON body; null selects the default of a field.

    Raises:
        RequestError: status 400: the body is invalid.
    """
    try:
        content = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise RequestError(400, "the body must be a JSON object")
    content = {name: value for name, value in content.items() if value is not None}
    for name, neutral in _UNSUPPORTED.items():
        if name in content and content.pop(name) not in neutral:
            allowed = " or ".join(map(repr, neutral))
            hint = f": omit it, or send {allowed}" if neutral else ": omit it"
            raise RequestError(400, f"{name} is not supported{hint}", param=name)
    content = {name: value for name, value in content.items() if name not in _IGNORED}
    try:
        request = kind.model_validate(content)
        if isinstance(request, GenerationRequest):
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


def check_ids(ids: Iterable[int], n_vocab: int, field: str) -> None:
    """Checks that the token ids of a field are in the vocabulary.

    Raises:
        RequestError: status 400: one is not.
    """
    invalid = next((i for i in ids if not 0 <= i < n_vocab), None)
    if invalid is not None:
        message = f"token {invalid} of {field} is outside the vocabulary of {n_vocab} tokens"
        raise RequestError(400, message, param=field.rpartition(" ")[2])


def max_new_tokens(
    requested: int | None, default: int | None, *, n_prompt: int, context: int, limit: int
) -> int:
    """Returns the largest number of tokens to generate.

    Args:
        requested: max_tokens of the request, if it has one.
        default: used if `requested` is None; None: as many as fit the context.
        n_prompt: length of the prompt [tokens].
        context: maximum length of prompt and output together [tokens].
        limit: the server's maximum length of the output [tokens].

    Raises:
        RequestError: status 400: the prompt or `requested` doesn't fit the context, or `requested`
            exceeds `limit`.
    """
    room = context - n_prompt
    if room < 1 or (requested or 0) > room:
        problem = f" and max_tokens of {requested} don't fit" if requested else " doesn't fit"
        raise RequestError(
            400,
            f"a prompt of {n_prompt} tokens{problem} the context of {context} tokens",
            param="max_tokens" if room > 0 else "prompt",
            code="context_length_exceeded",
        )
    if (requested or 0) > limit:
        message = f"max_tokens must be at most {limit} on this server, not {requested}"
        raise RequestError(400, message, param="max_tokens")
    return min(room, limit, default or limit) if requested is None else requested
