"""Scores token sequences: log-probabilities of given tokens; common prefixes are computed once.

The sequences are packed as prefix trees (`prefix_trees`), which need no KV cache.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.inference.logprobs import POSITIONS_PER_CHUNK, logprobs_from_hidden
from llama_jax.inference.prefix_trees import ScoreRequest, TreeRow, pack
from llama_jax.model.transformer import hidden_states
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.collectives import shard_sequence, to_text_order
from llama_jax.parallel.mesh import batch_shards, divisors, shard_array
from llama_jax.parallel.sharding import activation_spec
from llama_jax.runtime.program_store import stored_jit

# Rows have 256, 1024, 2048, 4096 … tokens: each length is one compiled program. In a short row a
# query has fewer keys of other requests, which cost attention without being attended to.
_SHORT_ROW, _LONG_ROW = 256, 1024
_MIN_PAIRS_PER_CHUNK = 32  # of a row; a multiple of the mesh's shards of a sequence


class Score(NamedTuple):
    """The log-probabilities of a request's scored tokens.

    Attributes:
        logprobs: float32, one of each scored token [nats].
        greedy: whether each scored token is the most likely one; among equally likely tokens, the
            one with the lowest id.
    """

    logprobs: np.ndarray
    greedy: bool

    @property
    def total(self) -> float:
        """The log-probability of all scored tokens together [nats]."""
        return float(np.sum(self.logprobs, dtype=np.float64))


class Trees(NamedTuple):
    """Rows that are prefix trees, int32, padded; see `TreeRow`."""

    tokens_BS: jax.Array
    positions_BS: jax.Array
    ends_BS: jax.Array
    queries_BS: jax.Array
    targets_BS: jax.Array
    n_pairs: int | jax.Array  # of the row with the most pairs


class PairLogprobs(NamedTuple):
    """The results of each pair (token, next token), replicated."""

    logprobs_BS: jax.Array  # float32: of the pair's next token [nats]
    top_logprobs_BSA: jax.Array  # float32: of the A most likely next tokens [nats]
    top_tokens_BSA: jax.Array  # int32


def score(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    requests: Sequence[ScoreRequest],
    *,
    row_tokens: int = 1024,
) -> Iterator[tuple[int, Score]]:
    """Returns an iterator over (index of a request, its score), in the order of computation.

    All processes of the mesh call it with the same requests, and take the same number of results.

    Args:
        config: the model's config; the model may be quantized.
        model: weights of that config, on the current mesh.
        requests: token sequences; the caller shortens those that are longer than the context.
        row_tokens: tokens that each shard of a batch computes at a time; more if a request is
            longer.

    Raises:
        InputError: a request has no scored token, no context, a token outside the vocabulary, or
            more tokens than the model's context.
    """
    for request in requests:
        _check_request(config, request)
    return _scores(config, model, requests, row_tokens)


def _check_request(config: ModelConfig, request: ScoreRequest) -> None:
    tokens, n_context = request
    if not 1 <= n_context < len(tokens):
        raise InputError(
            f"a request of {len(tokens)} tokens with {n_context} of context: at least one token of"
            " context and one to score are needed"
        )
    if len(tokens) - 1 > config.context:
        raise InputError(
            f"a request of {len(tokens)} tokens doesn't fit the model's context of"
            f" {config.context}: leave out tokens at its beginning"
        )
    if not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
        outside = next(token for token in tokens if not 0 <= token < config.vocab_size)
        raise InputError(
            f"token {outside} is outside the model's vocabulary of {config.vocab_size}: the"
            " tokenizer is not this model's"
        )


def _scores(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    requests: Sequence[ScoreRequest],
    row_tokens: int,
) -> Iterator[tuple[int, Score]]:
    previous: tuple[Sequence[TreeRow], PairLogprobs] | None = None
    for rows, trees in _batches(requests, row_tokens):
        computed = pair_logprobs(config, model, trees, top=1)
        if previous is not None:  # the devices compute a batch while the results are read
            yield from _read_scores(*previous)
        previous = rows, computed
    if previous is not None:
        yield from _read_scores(*previous)


def _batches(
    requests: Sequence[ScoreRequest], row_tokens: int
) -> Iterator[tuple[list[TreeRow], Trees]]:
    """Yields the rows of each batch; the longest first, so that memory is known to suffice."""
    members: dict[int, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        members[row_length(len(request.tokens) - 1)].append(index)
    for length in sorted(members, reverse=True):
        # Sorted, because each row of a batch costs as many pairs as the row with the most.
        rows = sorted(pack(requests, members[length], length), key=lambda row: len(row.queries))
        size = max(1, row_tokens // length) * batch_shards()
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            yield batch, stack_rows(batch, size, length)


def row_length(n_tokens: int) -> int:
    """Returns the length of the rows for requests of `n_tokens` computed tokens."""
    if n_tokens <= _SHORT_ROW:
        return _SHORT_ROW
    length = _LONG_ROW
    while length < n_tokens:
        length *= 2
    return length


def stack_rows(rows: Sequence[TreeRow], size: int, length: int) -> Trees:
    """Returns `size` rows of `length` tokens on the current mesh; padding attends to itself."""
    padded = np.zeros((5, size, length), np.int32)
    padded[2] = np.arange(1, length + 1)
    for i, row in enumerate(rows):
        for array, values in zip(padded, row[:5], strict=True):
            array[i, : len(values)] = values
    n_pairs = max((len(row.queries) for row in rows), default=0)
    return Trees(*(shard_array(array, "BS") for array in padded), n_pairs=n_pairs)


@stored_jit(static_argnums=0, static_argnames="top")
def pair_logprobs(
    config: ModelConfig, model: Llama | UnstackedLlama, trees: Trees, *, top: int
) -> PairLogprobs:
    """Returns the log-probabilities of all pairs, and of the `top` most likely tokens of each.

    Logits are materialized for a few pairs at a time, and only for pairs.
    """
    tokens_BT, positions_BT, ends_BT = map(shard_sequence, trees[:3])
    x_BTD = hidden_states(config, model, tokens_BT, positions_BT, ends_BT=ends_BT)
    x_BSD = to_text_order(jax.reshard(x_BTD, activation_spec("BSD")))
    B, S = trees.targets_BS.shape
    most = max(POSITIONS_PER_CHUNK * batch_shards() // B, _MIN_PAIRS_PER_CHUNK)
    size = max(n for n in divisors(S) if n <= most)

    def compute_chunk(i: jax.Array, results: PairLogprobs) -> PairLogprobs:
        queries_BS, targets_BS = (
            jax.lax.dynamic_slice_in_dim(x_BS, i * size, size, 1)
            for x_BS in (trees.queries_BS, trees.targets_BS)
        )
        found = logprobs_from_hidden(config, model, _take(x_BSD, queries_BS), targets_BS, top)
        return PairLogprobs(
            *(
                jax.lax.dynamic_update_slice_in_dim(all_pairs, chunk, i * size, 1)
                for all_pairs, chunk in zip(results, found, strict=True)
            )
        )

    def zeros(dtype: type, *more: int) -> jax.Array:
        spec = activation_spec("BSS"[: 2 + len(more)])
        return jnp.zeros((B, S, *more), dtype, out_sharding=spec)

    blank = PairLogprobs(zeros(jnp.float32), zeros(jnp.float32, top), zeros(jnp.int32, top))
    results = jax.lax.fori_loop(0, -(-trees.n_pairs // size), compute_chunk, blank)
    return jax.tree.map(lambda x: jax.reshard(x, activation_spec("SSS"[: x.ndim])), results)


def _take(x_BSD: jax.Array, indices_BS: jax.Array) -> jax.Array:
    """Returns the hidden states at some indices of each row."""

    def local(x_BSD: jax.Array, indices_BS: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BSD, indices_BS[..., None], axis=1)

    specs = activation_spec("BSD"), activation_spec("BS")
    mapped = jax.shard_map(local, in_specs=specs, out_specs=activation_spec("BSD"), check_vma=False)
    return mapped(x_BSD, indices_BS)


def _read_scores(rows: Sequence[TreeRow], computed: PairLogprobs) -> Iterator[tuple[int, Score]]:
    logprobs_BS, _, top_tokens_BSA = map(np.asarray, computed)
    for row, logprobs, top_tokens in zip(rows, logprobs_BS, top_tokens_BSA, strict=False):
        likeliest = top_tokens[: len(row.targets), 0] == row.targets
        for index, pairs in row.pairs.items():
            yield index, Score(logprobs[pairs], bool(likeliest[pairs].all()))
