"""The requests that an engine takes, and the events that it delivers."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.inference.logit_limits import MAX_BIAS
from llama_jax.inference.sampling import Sampling
from llama_jax.inference.stream import check_prompt

MAX_TOP_LOGPROBS = 20  # most likely tokens that a request may ask for at each position
MAX_END_IDS = 16  # end ids that a request may have


class Constraint(Protocol):
    """The tokens that one text allows next, for example those that continue a JSON document.

    Attributes:
        mask_W: uint32 [W], the allowed tokens as a row of `limit_logits`; missing words allow none.
        error: why no token can follow, in one sentence; None if one can.
    """

    mask_W: np.ndarray
    error: str | None

    def advance(self, token: int) -> None:
        """Computes the mask after one more token."""
        ...


class Request(NamedTuple):
    """A prompt, and the settings of its continuation.

    Attributes:
        prompt: token ids.
        max_new_tokens: the most tokens to generate.
        sampling: the sampling settings.
        seed: seed of the draws; a request gets the same tokens in any batch.
        end_ids: ids that end the text; the end id is its last token.
        top_logprobs: the number of most likely tokens that come with each token, up to 20.
        logprobs: whether tokens come with their log-probabilities (0 otherwise).
        prompt_logprobs: whether `PromptDone` has the log-probabilities of the prompt's tokens,
            all but the first.
        logit_bias: pairs of a token and the number [-100 … 100] that is added to its logit.
        constraint: limits the tokens; a new one for each request. None: all tokens are allowed.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    seed: int = 0
    end_ids: frozenset[int] = frozenset()
    top_logprobs: int = 0
    logprobs: bool = False
    prompt_logprobs: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    constraint: Constraint | None = None


def request_to_json(request: Request) -> dict[str, Any]:
    """Returns a request as plain JSON, without its constraint.

    The prompt becomes the sorted set of its ids, which is enough for penalties.
    """
    ids, ends = sorted({*request.prompt}), sorted(request.end_ids)
    return request._asdict() | {
        "prompt": ids,
        "sampling": asdict(request.sampling),
        "end_ids": ends,
        "constraint": None,
    }


def request_from_json(fields: dict[str, Any]) -> Request:
    """Inverts `request_to_json`."""
    prompt, ends = tuple(fields["prompt"]), frozenset(fields["end_ids"])
    sampling = Sampling(**fields["sampling"])
    return Request(**fields | {"prompt": prompt, "sampling": sampling, "end_ids": ends})


def check_request(config: ModelConfig, context: int, request: Request) -> None:
    """Checks that an engine with a context of `context` tokens can serve a request.

    Raises:
        InputError: the prompt is invalid, or a number is out of range.
    """
    check_prompt(config, request.prompt, 0)
    if request.max_new_tokens < 1:
        raise InputError(f"{request.max_new_tokens} new tokens: ask for at least 1")
    if len(request.prompt) + request.max_new_tokens > context:
        raise InputError(
            f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones don't"
            f" fit a context of {context}: shorten the prompt or ask for fewer"
        )
    if not 0 <= request.top_logprobs <= MAX_TOP_LOGPROBS:
        raise InputError(f"top_logprobs is {request.top_logprobs}: ask for 0 … {MAX_TOP_LOGPROBS}")
    if len(request.end_ids) > MAX_END_IDS:
        raise InputError(f"{len(request.end_ids)} end ids: at most {MAX_END_IDS} can be given")
    for token, bias in request.logit_bias:
        if not (0 <= token < config.vocab_size and -MAX_BIAS <= bias <= MAX_BIAS):
            raise InputError(
                f"logit_bias has {bias} for token {token}: give tokens below {config.vocab_size}"
                f" and numbers from -{MAX_BIAS:.0f} to {MAX_BIAS:.0f}"
            )


class GeneratedToken(NamedTuple):
    """A token, its log-probability [nats], and the most likely tokens with theirs, best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class PromptDone(NamedTuple):
    """The prompt is prefilled: the first event of a request."""

    prompt_logprobs: tuple[GeneratedToken, ...] = ()


class RequestEnded(NamedTuple):
    """The last event of a request.

    The reason `stop` means that the last token is an end id, `constraint` that the constraint of
    the request allows no further token, and `error` that the engine has failed.
    """

    reason: Literal["stop", "length", "cancelled", "constraint", "error"]
    message: str = ""


Event = PromptDone | GeneratedToken | RequestEnded


class QueueFull(Exception):
    """The queue is full."""


class EngineStopped(Exception):
    """The engine takes no more requests.

    Attributes:
        failure: the error that ended the engine; None if it was closed.
    """

    def __init__(self, failure: str | None):
        super().__init__(f"the engine has failed: {failure}" if failure else "the engine is closed")
        self.failure = failure


class Statistics(NamedTuple):
    """Counts since the engine started, and its current load. `/metrics` exports them."""

    waiting: int = 0  # requests in the queue
    running: int = 0  # requests in a row
    finished: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0  # prefilled
    reused_tokens: int = 0  # prompt tokens whose keys and values were still in the cache
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    bytes_read: int = 0  # by the decode steps: weights and cache
    compile_seconds: float = 0.0


class Ticket:
    """An accepted request: in the queue, in a row, or ended."""

    def __init__(
        self,
        request: Request,
        deliver: Callable[[Event], None],
        cancel: Callable[["Ticket"], None],
    ):
        self.request = request
        self.deliver = deliver
        self.cancelled = False
        self._cancel = cancel

    def cancel(self) -> None:
        """Ends the request; `RequestEnded("cancelled")` follows, unless it has ended already.

        A request in the queue leaves it at once, a request in a row before the next dispatch.
        """
        self._cancel(self)
