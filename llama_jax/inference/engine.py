"""The interface of the engine that the server stands before."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from llama_jax.family import ModelConfig
from llama_jax.inference.sampling import Sampling
from llama_jax.model.transformer import Llama


class Request(NamedTuple):
    """One text to be made."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int = 0
    end_ids: frozenset[int] = frozenset()
    top_logprobs: int = 0
    prompt_logprobs: bool = False


class MadeToken(NamedTuple):
    """A token, its log-probability, and the most likely ones."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Begun(NamedTuple):
    """The first event."""

    prompt_logprobs: list[MadeToken]


class Ended(NamedTuple):
    """The last event."""

    reason: Literal["stop", "length", "cancelled", "error"]
    message: str = ""


class QueueFull(Exception):
    """No more requests can wait."""


class Statistics(NamedTuple):
    """Counts since the start."""

    waiting: int
    running: int
    finished: int
    cancelled: int
    prompt_tokens: int
    made_tokens: int
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int
    bytes_read: int
    reused_tokens: int
    compile_seconds: float


class Ticket:
    """A submitted request."""

    def cancel(self) -> None:
        """Ends it."""


class Engine:
    """Continuous batching."""

    rows: int
    context: int

    def __init__(
        self, config: ModelConfig, model: Llama, *, rows: int, context: int, queue: int
    ) -> None:
        raise NotImplementedError

    def submit(
        self, request: Request, deliver: Callable[[Begun | MadeToken | Ended], None]
    ) -> Ticket:
        """Queues a request."""
        raise NotImplementedError

    def statistics(self) -> Statistics:
        """Returns the counts."""
        raise NotImplementedError

    def close(self) -> None:
        """Stops the thread."""
