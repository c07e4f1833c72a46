"""Generation as pure functions: prefill the prompts, then decode token by token."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax.config.model import ModelConfig
from llama_jax.inference.logit_limits import LogitBias, limit_logits
from llama_jax.inference.sampling import (
    Sampling,
    SamplingArrays,
    TokenCounts,
    logprobs_from_logits,
    sample,
    stack_sampling,
)
from llama_jax.model.cache import KVCache, init_cache
from llama_jax.model.inputs import as_token_array
from llama_jax.model.transformer import forward_cached, output_head
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import shard_array
from llama_jax.parallel.sharding import activation_spec
from llama_jax.runtime.program_store import stored_jit

NO_TOKEN = -1  # fills the columns after a row's last token


class Rows(NamedTuple):
    """The settings and the progress of each row of a batch."""

    remaining_B: jax.Array  # int32: tokens that the row may still generate; 0: the row has ended
    generated_B: jax.Array  # int32: tokens generated so far
    ends_BE: jax.Array  # int32: ids that end the row, padded with NO_TOKEN
    seeds_B: jax.Array  # uint32; token number i is drawn with fold_in(key(seed), i)
    sampling: SamplingArrays
    counts: TokenCounts
    bias: LogitBias | None = None  # None: no row has one


class DecodeState(NamedTuple):
    """The state of a batch between two decode steps."""

    cache: KVCache
    logits_BV: jax.Array  # float32 logits of each row's next token
    rows: Rows


class GeneratedTokens(NamedTuple):
    """Generated tokens, NO_TOKEN after a row's end, and their log-probabilities; replicated.

    The log-probabilities are those of the model, before temperature and penalties [nats].
    """

    tokens_Bn: jax.Array
    logprobs_Bn: jax.Array
    top_tokens_BnA: jax.Array  # the A most likely tokens at each position
    top_logprobs_BnA: jax.Array


def init_rows(
    samplings: Sequence[Sampling],
    seeds: Sequence[int],
    max_new_tokens: Sequence[int],
    end_ids: Sequence[Sequence[int]],
    prompts_BV: np.ndarray,
) -> Rows:
    """Returns rows with no generated tokens; each argument has one entry per row.

    Args:
        samplings: the sampling settings of each row.
        seeds: the seed of each row's draws; a row draws the same tokens in any batch.
        max_new_tokens: the number of tokens after which each row ends.
        end_ids: ids that end the row; the end id is the row's last token.
        prompts_BV: bool, the tokens of each row's prompt, for penalties.
    """
    E = max([1, *map(len, end_ids)])
    ends = [[*ids, *[NO_TOKEN] * (E - len(ids))] for ids in end_ids]
    return Rows(
        shard_array(np.array(max_new_tokens, np.int32), "B"),
        shard_array(np.zeros(len(seeds), np.int32), "B"),
        shard_array(np.array(ends, np.int32), "BS"),
        shard_array(np.array(seeds, np.uint32), "B"),
        SamplingArrays(*(shard_array(np.asarray(x_B), "B") for x_B in stack_sampling(samplings))),
        TokenCounts(
            shard_array(prompts_BV, "BS"), shard_array(np.zeros(prompts_BV.shape, np.int32), "BS")
        ),
    )


@stored_jit(static_argnums=0, static_argnames="slots")
def prefill(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    slots: int,
) -> tuple[KVCache, jax.Array]:
    """Returns a KV cache with the prompts, and the logits [B, V] after each prompt's last token.

    Args:
        config: static.
        model: weights of that config.
        tokens_BT: prompts, padded on the right to one length.
        lengths_B: tokens of each prompt, 1 … T.
        slots: slots of each row, for prompt and continuation; at least T.
    """
    cache = init_cache(config, len(tokens_BT), slots)
    return extend_cache(config, model, cache, tokens_BT, lengths_B)


def extend_cache(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    cache: KVCache,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
) -> tuple[KVCache, jax.Array]:
    """Returns the cache with T more tokens, and the logits [B, V] after each row's last token."""
    x_BTD, cache = forward_cached(config, model, cache, tokens_BT, lengths_B)
    return cache, last_logits(config, model, x_BTD, lengths_B)


def last_logits(
    config: ModelConfig, model: Llama | UnstackedLlama, x_BTD: jax.Array, lengths_B: jax.Array
) -> jax.Array:
    """Returns the logits [B, V] of each row's last token, from the hidden states of all T."""
    is_last_BT = jnp.arange(x_BTD.shape[1]) == lengths_B[:, None] - 1
    x_BTD = jax.reshard(x_BTD, activation_spec("BSD"))
    last_BTD = jnp.sum(jnp.where(is_last_BT[..., None], x_BTD, 0), axis=1, keepdims=True)
    return output_head(config, model, last_BTD)[:, 0]


@stored_jit(static_argnums=0, static_argnames=("capacity", "top"), donate_argnums=2)
def decode(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    state: DecodeState,
    n: jax.Array | int,
    with_logprobs: jax.Array | bool = False,
    mask_BW: jax.Array | None = None,
    *,
    capacity: int,
    top: int = 0,
) -> tuple[GeneratedTokens, DecodeState]:
    """Generates up to `n` tokens in each row that has not ended; returns them and the new state.

    The loop stops when all rows have ended. The result has `capacity` columns, of which at most `n`
    are used, so that one program serves any `n`. Each row needs one free slot more than it
    generates tokens, because each step writes a slot of every row, also of rows that have ended.
    Without `with_logprobs` all log-probabilities are 0 and the `top` alternatives are NO_TOKEN.
    `mask_BW` is that of `limit_logits`, for each of the `n` tokens.
    """
    B = len(state.rows.remaining_B)

    def compute_logprobs(logits_BV: jax.Array, token_B: jax.Array) -> tuple[jax.Array, ...]:
        chosen_B, top_logprobs_BA, top_tokens_BA = logprobs_from_logits(logits_BV, token_B, top)
        return reshard_all((chosen_B, top_tokens_BA, top_logprobs_BA))

    def reshard_all(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(jax.reshard(x_B_, activation_spec("BS"[: x_B_.ndim])) for x_B_ in arrays)

    def skip_logprobs(logits_BV: jax.Array, token_B: jax.Array) -> tuple[jax.Array, ...]:
        return reshard_all(tuple(x_Bn[:, 0] for x_Bn in blank[1:]))

    def is_unfinished(carry: tuple[jax.Array, GeneratedTokens, DecodeState]) -> jax.Array:
        i, _, state = carry
        return (i < n) & jnp.any(state.rows.remaining_B > 0)

    def step(carry: tuple[jax.Array, GeneratedTokens, DecodeState]):
        i, generated, (cache, logits_BV, rows) = carry
        active_B = rows.remaining_B > 0
        token_B = sample_next(rows, logits_BV, mask_BW)
        branches = compute_logprobs, skip_logprobs
        new = token_B, *jax.lax.cond(with_logprobs, *branches, logits_BV, token_B)
        columns = zip(generated, new, strict=True)
        generated = GeneratedTokens(
            *(_write_column(x_Bn_, i, x_B_, active_B) for x_Bn_, x_B_ in columns)
        )
        rows = advance_rows(rows, token_B)
        cache, logits_BV = extend_cache(
            config, model, cache, token_B[:, None], active_B.astype(jnp.int32)
        )
        logits_BV = jax.reshard(logits_BV, activation_spec("BV"))
        return i + 1, generated, DecodeState(cache, logits_BV, rows)

    def full(value: float, dtype: type, *more: int) -> jax.Array:
        spec = activation_spec("BSS"[: 2 + len(more)])
        return jnp.full((B, capacity, *more), value, dtype, out_sharding=spec)

    blank = GeneratedTokens(
        full(NO_TOKEN, jnp.int32),
        full(0.0, jnp.float32),
        full(NO_TOKEN, jnp.int32, top),
        full(0.0, jnp.float32, top),
    )
    _, generated, state = jax.lax.while_loop(is_unfinished, step, (jnp.int32(0), blank, state))
    # Every host reads all rows.
    replicated = (jax.reshard(x_Bn_, activation_spec("SSS"[: x_Bn_.ndim])) for x_Bn_ in generated)
    return GeneratedTokens(*replicated), state


def sample_next(rows: Rows, logits_BV: jax.Array, mask_BW: jax.Array | None) -> jax.Array:
    """Returns the next token of each row, int32 [B]; `mask_BW` is that of `limit_logits`."""
    keys_B = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(rows.seeds_B), rows.generated_B)
    logits_BV = limit_logits(rows.bias, mask_BW, logits_BV)
    return sample(rows.sampling, rows.counts, logits_BV, keys_B)


def advance_rows(rows: Rows, token_B: jax.Array) -> Rows:
    """Returns the rows after one more token in each row that has not ended."""
    active_B = rows.remaining_B > 0
    ended_B = jnp.any(token_B[:, None] == rows.ends_BE, axis=1)
    chosen_BV = jnp.arange(rows.counts.generated_BV.shape[1]) == token_B[:, None]
    generated_BV = rows.counts.generated_BV + (chosen_BV & active_B[:, None])
    return rows._replace(
        remaining_B=jnp.where(active_B & ~ended_B, rows.remaining_B - 1, 0),
        generated_B=rows.generated_B + active_B,
        counts=rows.counts._replace(generated_BV=generated_BV),
    )


def _write_column(
    generated_Bn_: jax.Array, i: jax.Array, new_B_: jax.Array, active_B: jax.Array
) -> jax.Array:
    """Returns the array with column `i` replaced in the active rows."""
    # JAX 0.12 may drop the sharding of a batch of one row over axes of one device: restore it.
    dims = "BSS"[: generated_Bn_.ndim]
    old_B_ = jax.lax.dynamic_index_in_dim(generated_Bn_, i, axis=1, keepdims=False)
    old_B_, new_B_ = (jax.reshard(x, activation_spec(dims[:-1])) for x in (old_B_, new_B_))
    active_B_ = active_B.reshape(-1, *(1 for _ in new_B_.shape[1:]))
    column_B_ = jnp.where(active_B_, new_B_.astype(old_B_.dtype), old_B_)
    generated_Bn_ = jax.lax.dynamic_update_index_in_dim(generated_Bn_, column_B_, i, axis=1)
    return jax.reshard(generated_Bn_, activation_spec(dims))


@partial(
    jax.jit,
    static_argnums=(0, 4),
    static_argnames=("max_new_tokens", "end_ids", "top", "left_padded"),
)
def generate(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    sampling: Sampling | tuple[Sampling, ...],
    seeds_B: jax.Array,
    *,
    max_new_tokens: int,
    end_ids: tuple[int, ...] = (),
    top: int = 0,
    left_padded: bool = False,
) -> GeneratedTokens:
    """Generates up to `max_new_tokens` after each prompt; stops when all rows have ended.

    >>> prompt = tokenizer.encode("The capital of France", bos=True)
    >>> rows, lengths, seeds = np.array([prompt] * 2), np.array([len(prompt)] * 2), np.arange(2)
    >>> found = lj.generate(config, model, rows, lengths, lj.Sampling(), seeds, max_new_tokens=5)
    >>> found.tokens_Bn.shape
    (2, 5)
    >>> bool((found.logprobs_Bn > -0.5).all())  # each token has a probability above 0.6
    True

    Args:
        config: static.
        model: weights of that config.
        tokens_BT: int32 prompts, padded to one length.
        lengths_B: int32 tokens of each prompt, 1 … T.
        sampling: static; the sampling settings, one for all rows or one per row.
        seeds_B: uint32 seed of each row's draws; a row draws the same tokens in any batch.
        max_new_tokens: the most tokens that a row generates.
        end_ids: ids that end a row; the end id is the row's last token.
        top: the number of most likely tokens to return at each position.
        left_padded: the padding is on the left of the prompts instead of the right.
    """
    tokens_BT = as_token_array(config, tokens_BT)
    lengths_B, seeds_B = jnp.asarray(lengths_B), jnp.asarray(seeds_B)
    B, T = tokens_BT.shape
    if left_padded:
        rows_B1, replicated_B = jnp.arange(B)[:, None], jax.reshard(lengths_B, P(None))
        source_BT = (jnp.arange(T) - replicated_B[:, None]) % T
        replicated_BT = jax.reshard(tokens_BT, P(None, None))
        tokens_BT = replicated_BT.at[rows_B1, source_BT].get(out_sharding=activation_spec("BT"))
    ends_E = jnp.array([*end_ids, NO_TOKEN], jnp.int32)
    samplings = (sampling,) * B if isinstance(sampling, Sampling) else sampling
    rows = Rows(
        jnp.full((B,), max_new_tokens, jnp.int32, out_sharding=activation_spec("B")),
        jnp.zeros((B,), jnp.int32, out_sharding=activation_spec("B")),
        jnp.broadcast_to(ends_E, (B, len(ends_E)), out_sharding=activation_spec("BS")),
        jax.reshard(seeds_B.astype(jnp.uint32), activation_spec("B")),
        SamplingArrays(
            *(
                jax.reshard(jnp.asarray(x_B), activation_spec("B"))
                for x_B in stack_sampling(samplings)
            )
        ),
        _counts(config, tokens_BT, lengths_B),
    )
    slots = T + max_new_tokens + 1
    cache, logits_BV = prefill(config, model, tokens_BT, lengths_B, slots=slots)
    state = DecodeState(cache, logits_BV, rows)
    generated, _ = decode(
        config, model, state, max_new_tokens, True, capacity=max_new_tokens, top=top
    )
    return generated


def _counts(config: ModelConfig, tokens_BT: jax.Array, lengths_B: jax.Array) -> TokenCounts:
    """Returns the counts of rows with no generated tokens."""
    shape = len(tokens_BT), config.vocab_size
    zeros_BV = jnp.zeros(shape, jnp.int32, out_sharding=activation_spec("BS"))

    def add_column(in_prompt_BV: jax.Array, column: tuple[jax.Array, jax.Array]):
        token_B, valid_B = column
        return in_prompt_BV | ((jnp.arange(shape[1]) == token_B[:, None]) & valid_B[:, None]), None

    valid_BT = jnp.arange(tokens_BT.shape[1]) < lengths_B[:, None]
    columns = (jax.reshard(x, activation_spec("BS")).T for x in (tokens_BT, valid_BT))
    prompt_BV, _ = jax.lax.scan(add_column, zeros_BV.astype(bool), tuple(columns))
    return TokenCounts(prompt_BV, zeros_BV)
