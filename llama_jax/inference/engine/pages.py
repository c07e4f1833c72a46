"""Rows that share a pool of pages: which pages a row gets, and which of them it shares.

Before a request starts, it gets all pages that its prompt and its longest continuation need. So no
row is interrupted while it generates. An interrupted row would be recomputed by programs of other
shapes, whose roundings could change its tokens.
"""

from collections.abc import Iterator, Sequence
from hashlib import sha256

import numpy as np

from llama_jax.inference.engine.device_batch import DeviceBatch
from llama_jax.inference.engine.page_pool import Pool
from llama_jax.inference.engine.requests import Request
from llama_jax.inference.engine.row_programs import cache_sizes
from llama_jax.inference.engine.rows import FreeRow, Row


class PagedRows:
    """Assigns rows and pages. The interface is that of `slots.RowSlots`."""

    def __init__(self, batch: DeviceBatch, rows: Sequence[Row], context: int):
        assert batch.pages is not None
        self._batch, self._rows, self.prefill_slots = batch, rows, cache_sizes(context)
        self._page_slots = batch.page_slots
        self._pools = [Pool(batch.pages) for _ in range(batch.copies)]

    def find(self, prompt: Sequence[int], request: Request) -> FreeRow | None:
        """Returns a free row whose copy has the pages for a request; None while there is none."""
        size = len(self._rows) // len(self._pools)
        n_pages = pages_needed(request, self._page_slots)
        best: tuple[tuple[int, int], FreeRow] | None = None
        for number, pool in enumerate(self._pools):
            free = [r for r in self._rows[number * size : (number + 1) * size] if r.ticket is None]
            shared = list(self._find_prefix(pool, prompt))
            pages = [page for _, page in shared]
            if free and pool.can_hold(pages, n_pages - len(shared)):
                oldest = min(free, key=lambda row: row.assigned_at)
                preference = len(shared), len(free)
                if best is None or preference > best[0]:
                    best = (
                        preference,
                        FreeRow(oldest, oldest, len(shared) * self._page_slots, shared),
                    )
        return best and best[1]

    def assign(self, free_row: FreeRow, request: Request) -> int:
        """Gives pages to a row that has its request; returns the tokens in the shared pages."""
        row, pool = free_row.row, self._pool(free_row.row)
        for _, page in free_row.shared:
            pool.hold(page)
        n_new = pages_needed(request, self._page_slots) - len(free_row.shared)
        row.pages = [page for _, page in free_row.shared] + [pool.take() for _ in range(n_new)]
        row.page_names = [name for name, _ in free_row.shared]
        row.tokens = list(request.prompt[: len(free_row.shared) * self._page_slots])
        self._batch.set_pages(self._rows.index(row), row.pages)
        return len(row.tokens)

    def share(self, row: Row) -> int:
        """Replaces the row's next pages by those that another row has prefilled meanwhile.

        Returns the tokens in these pages.
        """
        first, ticket = len(row.page_names), row.ticket
        if ticket is None or row.ready or ticket.request.prompt_logprobs:
            return 0
        if len(row.tokens) != first * self._page_slots:
            return 0
        pool, prompt = self._pool(row), ticket.request.prompt
        shared = list(self._find_prefix(pool, prompt, row.page_names))
        for i, (name, page) in enumerate(shared, first):
            pool.hold(page)
            pool.release(row.pages[i])
            row.pages[i] = page
            row.page_names.append(name)
        if shared:
            row.tokens = list(prompt[: len(row.page_names) * self._page_slots])
            self._batch.set_pages(self._rows.index(row), row.pages)
        return len(shared) * self._page_slots

    def record(self, row: Row) -> None:
        """Names the pages that the row has completed."""
        names = row.page_names
        for i in range(len(names), len(row.tokens) // self._page_slots):
            names.append(self._name_page(names, row.tokens, i))
            self._pool(row).name(row.pages[i], names[i])

    def release(self, row: Row) -> None:
        """Releases the pages of a row whose request ends."""
        self.record(row)
        for page in reversed(row.pages):
            self._pool(row).release(page)
        row.pages, row.page_names, row.tokens = [], [], []

    def slots_read(self) -> int:
        """Returns the slots that a decode step reads in a row on average."""
        return sum(len(row.tokens) for row in self._rows if row.ready) // len(self._rows)

    def _pool(self, row: Row) -> Pool:
        return self._pools[self._rows.index(row) * len(self._pools) // len(self._rows)]

    def _find_prefix(
        self, pool: Pool, prompt: Sequence[int], names: Sequence[bytes] = ()
    ) -> Iterator[tuple[bytes, int]]:
        """Yields the next complete pages of a prompt that the pool has, after those of `names`.

        The prompt's last token is in none of them: its prefill gives the first new token.
        """
        names = [*names]
        for i in range(len(names), (len(prompt) - 1) // self._page_slots):
            names.append(self._name_page(names, prompt, i))
            page = pool.find(names[i])
            if page is None:
                return
            yield names[i], page

    def _name_page(self, names: Sequence[bytes], tokens: Sequence[int], i: int) -> bytes:
        """Returns the name of page `i`, given those before: a hash of all tokens up to its end."""
        size = self._page_slots
        ids = np.asarray(tokens[i * size : (i + 1) * size], np.int32)
        return sha256((names[i - 1] if i else b"") + ids.tobytes()).digest()


def pages_needed(request: Request, page_slots: int) -> int:
    """Returns the pages of a request, prompt and longest continuation."""
    return -(-(len(request.prompt) + request.max_new_tokens) // page_slots)
