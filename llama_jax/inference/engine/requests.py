"""What is asked of an engine, and what it answers."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.inference.sampling import Sampling
from llama_jax.inference.stream import check_prompt

MAX_TOP_LOGPROBS = 20  # alternatives that a request may ask for
MAX_END_IDS = 16  # end ids that it may have


class Request(NamedTuple):
    """A prompt, and how it is to be continued.

    Attributes:
        prompt: token ids.
        max_new_tokens: at most so many are made.
        sampling: how they are drawn.
        seed: of the draws; the same request makes the same tokens alone and in company.
        end_ids: any of these ends the text, and is its last token.
        top_logprobs: how many alternatives each token carries, up to 20.
        logprobs: whether tokens carry their log-probabilities (0 otherwise).
        prompt_logprobs: whether `PromptDone` carries those of the prompt's tokens but the first.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    seed: int = 0
    end_ids: frozenset[int] = frozenset()
    top_logprobs: int = 0
    logprobs: bool = False
    prompt_logprobs: bool = False


def check_request(config: ModelConfig, context: int, request: Request) -> None:
    """Checks that a request can be served in a context of so many tokens.

    Raises:
        InputError: says what it asks too much of.
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
        raise InputError(f"{request.top_logprobs} alternatives: ask for 0 … {MAX_TOP_LOGPROBS}")
    if len(request.end_ids) > MAX_END_IDS:
        raise InputError(f"{len(request.end_ids)} end ids: at most {MAX_END_IDS} can be given")


class GeneratedToken(NamedTuple):
    """A token, its log-probability [nats] and the most likely ones with theirs."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class PromptDone(NamedTuple):
    """The prompt has been read: the first event of a request."""

    prompt_logprobs: tuple[GeneratedToken, ...] = ()


class RequestEnded(NamedTuple):
    """The last event of a request; with the reason `stop` an end id was made."""

    reason: Literal["stop", "length", "cancelled", "error"]
    message: str = ""


Event = PromptDone | GeneratedToken | RequestEnded


class QueueFull(Exception):
    """The queue is full."""


class EngineStopped(Exception):
    """The engine takes no more requests.

    Attributes:
        failure: why it has failed; None: it was closed.
    """

    def __init__(self, failure: str | None):
        super().__init__(f"the engine has failed: {failure}" if failure else "the engine is closed")
        self.failure = failure


class Statistics(NamedTuple):
    """What an engine has done since it began, and what it is doing."""

    waiting: int = 0
    running: int = 0
    finished: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0  # read
    reused_tokens: int = 0  # of prompts, found in the slots of an earlier text
    made_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    bytes_read: int = 0  # by these steps
    compile_seconds: float = 0.0


class Ticket:
    """A request that was accepted: in the queue, in a row, or ended."""

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
        """Ends the request: `RequestEnded("cancelled")` follows, if it has not ended yet.

        A request in the queue leaves it at once, one in a row before the next step.
        """
        self._cancel(self)
