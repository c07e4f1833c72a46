"""How many slots the engine's KV cache has, and how many of a row's slots a prompt can reuse."""

from collections.abc import Sequence

from llama_jax.inference.engine.requests import Request
from llama_jax.inference.engine.row_programs import CHUNK_SIZES


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


def common_prefix_length(tokens: Sequence[int], prompt: Sequence[int]) -> int:
    """Returns the length of the longest common prefix of two texts [tokens]."""
    pairs = zip(tokens, prompt, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(prompt)))
