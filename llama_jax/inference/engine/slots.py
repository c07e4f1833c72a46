"""The rows of the engine's batch: how many slots they have, and which row a prompt gets."""

from collections.abc import Sequence

from llama_jax.inference.engine.requests import Constraint, GeneratedToken, Request, Ticket
from llama_jax.inference.engine.row_programs import CHUNK_SIZES
from llama_jax.inference.prefix_trees import common_prefix_length


class Row:
    """A row of the batch: its request, and the tokens whose keys and values are in its slots."""

    def __init__(self):
        self.tokens: list[int] = []
        self.ticket: Ticket | None = None  # None: the row is free
        self.ready = False  # the prompt is prefilled
        self.prompt_logprobs: list[GeneratedToken] = []  # if requested; without the first token
        self.assigned_at = 0.0  # when it was last assigned to a request [s]

    @property
    def constraint(self) -> Constraint | None:
        """What limits the tokens of the row, if it decodes and its request has a constraint."""
        return self.ticket.request.constraint if self.ready and self.ticket else None


def choose_row(rows: Sequence[Row], prompt: Sequence[int]) -> tuple[Row, Row, int]:
    """Returns the free row to assign, the row with the longest common prefix, and that length.

    The prefix leaves out the prompt's last token: its prefill gives the first new token.
    """
    free = [row for row in rows if row.ticket is None]
    common = {row: common_prefix_length(row.tokens, prompt[:-1]) for row in rows}
    source = max(rows, key=lambda row: (common[row], row in free))
    oldest = min(free, key=lambda row: row.assigned_at)
    row = source if source in free and common[source] else oldest
    return row, source if common[source] else row, common[source]


def cache_sizes(context: int) -> list[int]:
    """Returns the numbers of slots that the cache may have, ascending.

    The largest has room for a chunk after the longest text, because prefill writes a full chunk,
    padding included. Each size is four times the one before, and none is near the largest: each
    size needs its own programs, which take seconds to compile at the start.
    """
    largest, size = context + CHUNK_SIZES[-1], 2 * CHUNK_SIZES[-1]
    smaller = []
    while 2 * size < largest:
        smaller.append(size)
        size *= 4
    return [*smaller, largest]


def slots_needed(request: Request) -> int:
    """Returns the slots that a request needs, prompt and continuation.

    After the prompt it needs a full chunk, or one slot more than its new tokens if that is larger.
    """
    return len(request.prompt) + max(CHUNK_SIZES[-1], request.max_new_tokens + 1)
