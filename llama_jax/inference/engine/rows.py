"""The rows of the engine's batch, and the parts of their prompts that one dispatch prefills."""

from collections.abc import Sequence
from typing import NamedTuple

from llama_jax.inference.engine.requests import Constraint, GeneratedToken, Ticket
from llama_jax.inference.engine.row_programs import CHUNK_SIZES
from llama_jax.parallel.mesh import platform


class Row:
    """A row of the batch: its request, and the tokens whose keys and values are in the cache."""

    def __init__(self):
        self.tokens: list[int] = []
        self.ticket: Ticket | None = None  # None: the row is free
        self.ready = False  # the prompt is prefilled
        self.prompt_logprobs: list[GeneratedToken] = []  # if requested; without the first token
        self.assigned_at = 0.0  # when it was last assigned to a request [s]
        self.pages: list[int] = []  # of a cache in pages; they have room for the complete request
        self.page_names: list[bytes] = []  # of its first complete pages, see `page_pool.Pool`

    @property
    def constraint(self) -> Constraint | None:
        """The constraint of the row's request; None if there is none or the row doesn't decode."""
        return self.ticket.request.constraint if self.ready and self.ticket else None


class FreeRow(NamedTuple):
    """A free row for a request, and the cached prefix of the request's prompt.

    Attributes:
        row: the free row.
        source: the row with the longest common prefix; `row` itself if no slots are copied.
        common: tokens of that prefix.
        shared: pages that the row shares, with their names.
    """

    row: Row
    source: Row
    common: int
    shared: Sequence[tuple[bytes, int]] = ()


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


def next_chunks(
    rows: Sequence[Row], copies: int, sizes: Sequence[int] = ()
) -> tuple[list[Chunk], int, int | None]:
    """Returns the chunk of the oldest prompt, at most one in each other copy, and their program.

    The program for a prompt depends on that prompt alone: a request gets the same bits whatever is
    prefilled in the same dispatch.

    Args:
        rows: of the batch; one or more have a prompt to prefill.
        copies: of the model; they have equally many, consecutive rows.
        sizes: numbers of slots to which a program may attend, ascending.

    Returns:
        The chunks, the tokens of their program, and the slots to which it attends; None: all.
    """
    program: tuple[int, int | None] = 0, None
    chunks = dict[int, Chunk]()
    numbers = [i for i, row in enumerate(rows) if row.ticket is not None and not row.ready]
    for number in sorted(numbers, key=lambda i: rows[i].assigned_at):
        ticket, used = rows[number].ticket, len(rows[number].tokens)
        rest = ticket.request.prompt[used:] if ticket else ()
        size = _chunk_size(len(rest))
        own = size, next((slots for slots in sizes if slots >= used + size), None)
        program = own if not chunks else program
        if own == program:
            chunk = Chunk(number, rest[:size], rest[1 : size + 1], used)
            chunks.setdefault(number * copies // len(rows), chunk)
    size, slots = program
    return [*chunks.values()], size, slots


def _chunk_size(n_tokens: int) -> int:
    """Returns the tokens of the next chunk's program, when `n_tokens` of a prompt remain.

    While an accelerator reads the weights, it can compute many more than 32 tokens, so fewer chunks
    are faster. A CPU is limited by the products, and padding costs as much as tokens: SmolLM2-135M
    takes 1.9 ms a token in chunks of 32, and 1.5 in chunks of 256.
    """
    if platform() == "cpu":
        return next((size for size in CHUNK_SIZES[::-1] if size <= n_tokens), CHUNK_SIZES[0])
    return next((size for size in CHUNK_SIZES if size >= n_tokens), CHUNK_SIZES[-1])
