"""The rows of the engine's batch: how many slots they have, and which row a prompt gets."""

from collections.abc import Sequence
from typing import NamedTuple

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


class Chunk(NamedTuple):
    """A part of a row's prompt that one dispatch prefills.

    Attributes:
        row: number of the row.
        tokens: the next tokens of its prompt.
        targets: the token after each, as far as the prompt goes.
        used: tokens that the row has already.
    """

    row: int
    tokens: Sequence[int]
    targets: Sequence[int]
    used: int


def next_chunks(rows: Sequence[Row], copies: int) -> tuple[list[Chunk], int]:
    """Returns the chunk of the oldest prompt, at most one in each other copy, and their size.

    The size depends on a prompt alone: a request gets the same bits whatever is prefilled beside.

    Args:
        rows: of the batch; one or more have a prompt to prefill.
        copies: of the model; each has as many consecutive rows.
    """
    size, chunks = 0, dict[int, Chunk]()
    numbers = [i for i, row in enumerate(rows) if row.ticket is not None and not row.ready]
    for number in sorted(numbers, key=lambda i: rows[i].assigned_at):
        ticket, used = rows[number].ticket, len(rows[number].tokens)
        rest = ticket.request.prompt[used:] if ticket else ()
        own_size = next((s for s in CHUNK_SIZES if s >= len(rest)), CHUNK_SIZES[-1])
        size = size or own_size
        if own_size == size:
            chunk = Chunk(number, rest[:size], rest[1 : size + 1], used)
            chunks.setdefault(number * copies // len(rows), chunk)
    return [*chunks.values()], size


def choose_row(rows: Sequence[Row], prompt: Sequence[int], copies: int = 1) -> tuple[Row, Row, int]:
    """Returns the free row to assign, the row with the longest common prefix, and that length.

    Both are of the same copy of the model. The prefix leaves out the prompt's last token: its
    prefill gives the first new token.

    Args:
        rows: of the batch; one or more are free.
        prompt: of the request.
        copies: of the model; each has as many consecutive rows.
    """
    common = {row: common_prefix_length(row.tokens, prompt[:-1]) for row in rows}
    size = len(rows) // copies
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]

    def preference(group: Sequence[Row]) -> tuple[bool, int, int]:
        # A prefix that saves no chunk, such as the begin token, should not fill one copy first.
        saved = max(common[row] for row in group) // CHUNK_SIZES[0]
        n_free = sum(row.ticket is None for row in group)
        return n_free > 0, saved, n_free

    group = max(groups, key=preference)
    free = [row for row in group if row.ticket is None]
    source = max(group, key=lambda row: (common[row], row in free))
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
