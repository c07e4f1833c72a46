"""Rows that own their slots: which row a prompt gets, and how many slots the rows have."""

from collections.abc import Sequence

from llama_jax.inference.engine.device_batch import DeviceBatch
from llama_jax.inference.engine.requests import Request
from llama_jax.inference.engine.row_programs import CHUNK_SIZES, cache_sizes
from llama_jax.inference.engine.rows import FreeRow, Row
from llama_jax.inference.prefix_trees import common_prefix_length
from llama_jax.model.cache import PAGE
from llama_jax.parallel.mesh import platform


class RowSlots:
    """Assigns rows that own their slots. All have as many slots as the largest request needs.

    The keys and values of a row stay when its request ends. A prompt with a common prefix continues
    that row, or gets a copy of its slots.
    """

    prefill_slots: Sequence[int] = ()  # one program of each chunk size, for all slots

    def __init__(self, batch: DeviceBatch, rows: Sequence[Row], context: int):
        self._batch, self._rows, self._sizes = batch, rows, cache_sizes(context)

    def find(self, prompt: Sequence[int], request: Request) -> FreeRow | None:
        """Returns a free row for a request; None while there is none.

        Args:
            prompt: the tokens of the request's prompt that may be reused.
            request: the request.
        """
        if all(row.ticket is not None for row in self._rows):
            return None
        return FreeRow(*choose_row(self._rows, prompt, self._batch.copies))

    def assign(self, free_row: FreeRow, request: Request) -> int:
        """Copies the common prefix to a row that has its request; returns its length [tokens]."""
        row, source, common, _ = free_row
        if source is not row:
            self._batch.copy_row(self._rows.index(source), self._rows.index(row), common)
        row.tokens = list(request.prompt[:common])
        needed = max(slots_needed(row.ticket.request) for row in self._rows if row.ticket)
        slots = next(size for size in self._sizes if size >= needed)
        if slots != self._batch.slots:
            self._batch.resize(slots)
            for other in self._rows:
                other.tokens = other.tokens[: slots - 1]
        return common

    def share(self, row: Row) -> int:
        """Returns 0: a prefix is copied before the prefill, or not at all."""
        return 0

    def record(self, row: Row) -> None:
        """Does nothing: `find` compares the tokens of the rows."""

    def release(self, row: Row) -> None:
        """Does nothing: keys and values stay in the row."""

    def slots_read(self) -> int:
        """Returns the slots that a decode step reads in each row."""
        if platform() != "cpu":
            return self._batch.slots
        longest = max(len(row.tokens) for row in self._rows if row.ready)
        return min(self._batch.slots, -(-longest // PAGE) * PAGE)


def choose_row(rows: Sequence[Row], prompt: Sequence[int], copies: int = 1) -> tuple[Row, Row, int]:
    """Returns the free row to assign, the row with the longest common prefix, and that length.

    Both are of the same copy of the model. The prefix leaves out the prompt's last token: its
    prefill gives the first new token.

    Args:
        rows: of the batch; one or more are free.
        prompt: of the request.
        copies: of the model; they have equally many, consecutive rows.
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


def slots_needed(request: Request) -> int:
    """Returns the slots that a request needs, prompt and continuation.

    After the prompt it needs a full chunk, or one slot more than its new tokens if that is larger.
    """
    return len(request.prompt) + max(CHUNK_SIZES[-1], request.max_new_tokens + 1)
