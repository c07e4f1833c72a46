"""The pool of pages of a KV cache: how many there are, and who holds them."""

from collections import OrderedDict
from collections.abc import Sequence

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.inference.engine.row_programs import cache_sizes
from llama_jax.model.attention import has_cache_kernel
from llama_jax.model.cache import page_slots
from llama_jax.parallel.mesh import batch_shards, platform

# Entries of the table of pages: a TPU core has 1 MiB of scalar memory (measured: the compiler
# rejects 281,600 entries on v5e and accepts 230,400), of which positions and spills take some.
MAX_TABLE = 250_000


def pool_pages(
    config: ModelConfig, rows: int, context: int, cache_tokens: int | None
) -> int | None:
    """Returns the pages of the pool of each copy of the model, or None if rows own their slots.

    Page 0 of a pool belongs to no row.

    Args:
        config: the model's config.
        rows: of the batch.
        context: longest prompt with its continuation [tokens].
        cache_tokens: tokens for which the pools together have room. None: rows × context, where
            attention has a kernel that reads pages (`has_cache_kernel`). Elsewhere the rows own
            their slots, because without a kernel XLA copies the pages of all rows in each step.

    Raises:
        InputError: the cache has no room for the longest text, or the kernel has none for the table
            of pages.
    """
    slots = page_slots(config)
    copies, row_pages = batch_shards(), -(-context // slots)
    has_kernel = has_cache_kernel(config.attention, config.head_dim)
    if cache_tokens is None and not has_kernel:
        return None
    table_pages = -(-cache_sizes(context)[-1] // slots)
    if platform() == "tpu" and has_kernel and rows // copies * table_pages > MAX_TABLE:
        raise InputError(
            f"the table of the pages of {rows} rows with a context of {context} tokens is too large"
            " for the scalar memory of a TPU: ask for at most"
            f" {MAX_TABLE // table_pages * copies} rows, or for a shorter context"
        )
    if cache_tokens is None:
        return 1 + rows // copies * row_pages
    pages = cache_tokens // slots // copies
    if pages < row_pages:
        smallest = row_pages * slots * copies
        in_copies = f" in each of {copies} copies of the model" if copies > 1 else ""
        raise InputError(
            f"a cache of {cache_tokens} tokens has no room for a text of {context}{in_copies}: ask"
            f" for at least {smallest}, or for a shorter context"
        )
    return 1 + pages


class Pool:
    """The pages of one copy of the model: free, held by rows, or retained for later prompts.

    A complete page may have a name, which identifies all tokens up to the page's end. Rows that
    begin with these tokens hold the page together. When no row holds it any more, it is retained
    until a row needs memory: the page that was released longest ago is reused first. Rows release
    their last page first.
    """

    def __init__(self, pages: int):
        self._free = list(range(pages - 1, 0, -1))
        self._holders = [0] * pages
        self._pages: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()  # with a name, in the order of release

    def find(self, name: bytes) -> int | None:
        """Returns the page of a name; None if there is none."""
        return self._pages.get(name)

    def can_hold(self, shared: Sequence[int], n_new: int) -> bool:
        """Returns whether a row can hold the pages `shared` and `n_new` pages of its own."""
        unheld = len(self._unheld) - sum(page in self._unheld for page in shared)
        return n_new <= len(self._free) + unheld

    def hold(self, page: int) -> None:
        """Adds a holder to a named page."""
        self._unheld.pop(page, None)
        self._holders[page] += 1

    def take(self) -> int:
        """Returns a page that nobody else holds."""
        if not self._free:
            page, _ = self._unheld.popitem(last=False)
            del self._pages[self._names.pop(page)]
            self._free.append(page)
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def name(self, page: int, name: bytes) -> None:
        """Names a complete page, unless another page has the name."""
        if name not in self._pages:
            self._pages[name], self._names[page] = page, name

    def release(self, page: int) -> None:
        """Removes a holder. A page without holders is retained if it has a name, otherwise free."""
        self._holders[page] -= 1
        if self._holders[page]:
            return
        if page in self._names:
            self._unheld[page] = None
        else:
            self._free.append(page)
