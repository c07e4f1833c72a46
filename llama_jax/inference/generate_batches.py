"""Continues many prompts in batches of equal shapes, on any mesh and any number of hosts."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.inference.generate import (
    NO_TOKEN,
    DecodeState,
    GeneratedTokens,
    decode,
    init_rows,
    prefill,
)
from llama_jax.inference.sampling import Sampling
from llama_jax.inference.stream import check_prompt
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import batch_shards, shard_array
from llama_jax.tokenizer.tokenizer import Tokenizer

# Of one shard of the batch. Decoding reads all weights once for all rows; the cache of so many
# slots takes 4 GB for 7B in bfloat16.
_MAX_ROWS, _MAX_SLOTS = 16, 8192
_BLOCK = 16  # tokens generated in one dispatch; stop strings are searched after each


class GenerateRequest(NamedTuple):
    """A prompt to continue.

    Attributes:
        tokens: ids of the prompt, at least one.
        max_new_tokens: the most tokens to generate.
        stops: texts, not empty; the row ends at the latest a block after the first of them.
        sampling: the sampling settings.
        seed: of the draws, uint32.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    seed: int = 0


def generate_batches(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    tokenizer: Tokenizer,
    requests: Sequence[GenerateRequest],
) -> Iterator[tuple[int, list[int]]]:
    """Yields the index of each request and its generated tokens, batch by batch.

    An end id is the last token of its row; after a stop string, up to a block of tokens follows.
    Requests of similar length share a batch, the longest first, and few shapes are compiled. All
    hosts of the mesh call this with the same requests, and get the same tokens. A request gets the
    tokens that it gets alone.

    Args:
        config: the model's config.
        model: weights of that config, on a mesh that does not split sequences.
        tokenizer: the model's tokenizer.
        requests: in any order.

    Raises:
        InputError: a prompt is empty, contains an unknown id, or doesn't fit the model's context.
    """
    for request in requests:
        check_prompt(config, request.tokens, request.max_new_tokens)
    order = sorted(range(len(requests)), key=lambda i: (_slots(requests[i]), -i), reverse=True)
    while order:
        slots = _slots(requests[order[0]])
        most = batch_shards() * _power_below(min(_MAX_ROWS, _MAX_SLOTS // slots))
        batch, order = order[:most], order[most:]
        rows = batch_shards()
        while rows < len(batch):
            rows *= 2
        generated = _generate_batch(config, model, tokenizer, [requests[i] for i in batch], rows)
        yield from zip(batch, generated, strict=True)


def _generate_batch(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    tokenizer: Tokenizer,
    requests: Sequence[GenerateRequest],
    rows: int,
) -> list[list[int]]:
    """Returns the generated tokens of each request, computed in one batch of `rows` rows."""
    n_fill = rows - len(requests)  # rows that generate nothing
    filled = [*requests, *[requests[-1]._replace(max_new_tokens=0)] * n_fill]
    lengths = np.array([len(request.tokens) for request in filled], np.int32)
    tokens = np.zeros((rows, _round_up(lengths.max())), np.int32)
    in_prompt = np.zeros((rows, config.vocab_size), bool)
    for row, seen, request in zip(tokens, in_prompt, filled, strict=True):
        row[: len(request.tokens)] = request.tokens
        seen[[*request.tokens]] = True
    slots = max(tokens.shape[1], *(_slots(request) for request in filled))
    cache, logits = prefill(
        config, model, shard_array(tokens, "BT"), shard_array(lengths, "B"), slots=slots
    )
    remaining = np.array([request.max_new_tokens for request in filled], np.int32)
    samplings, seeds = [r.sampling for r in filled], [r.seed for r in filled]
    ends = [sorted(tokenizer.end_ids)] * rows
    state = DecodeState(
        cache, logits, init_rows(samplings, seeds, remaining.tolist(), ends, in_prompt)
    )
    generated: list[list[int]] = [[] for _ in filled]
    while remaining.any():
        # Rows with a stop string have ended here, and only here.
        state = state._replace(rows=state.rows._replace(remaining_B=shard_array(remaining, "B")))
        found: GeneratedTokens
        found, state = decode(config, model, state, _BLOCK, capacity=_BLOCK)
        block = np.asarray(found.tokens_Bn)
        for i in np.flatnonzero(remaining):
            new = block[i][block[i] != NO_TOKEN].tolist()
            generated[i] += new
            ended = not tokenizer.end_ids.isdisjoint(new) or _stops(
                tokenizer, filled[i], generated[i]
            )
            remaining[i] = 0 if ended else remaining[i] - len(new)
    return generated[: len(requests)]


def _stops(tokenizer: Tokenizer, request: GenerateRequest, generated: Sequence[int]) -> bool:
    text = tokenizer.decode(generated) if request.stops else ""
    return any(stop in text for stop in request.stops)


def _slots(request: GenerateRequest) -> int:
    """Returns the slots of the KV cache: of the padded prompt, or of all tokens and one more."""
    n = len(request.tokens)
    return _round_up(max(_round_up(n), n + request.max_new_tokens + 1))


def _round_up(number: int) -> int:
    """Returns the next power of two or three quarters of one, at least 32: few sizes serve all."""
    power = 1 << max(5, int(number - 1).bit_length())
    return power * 3 // 4 if 32 <= number <= power * 3 // 4 else power


def _power_below(number: int) -> int:
    """Returns the largest power of two up to `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1)
