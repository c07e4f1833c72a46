"""Continuing texts: reading the prompts, then making token after token, as pure functions."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax.config.model import ModelConfig
from llama_jax.inference.sampling import (
    Sampling,
    SamplingArrays,
    TokenCounts,
    logprobs_from_logits,
    sample,
    stack_sampling,
)
from llama_jax.model.cache import KVCache, init_cache
from llama_jax.model.transformer import as_token_array, forward_cached, output_head
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import shard_array
from llama_jax.parallel.sharding import activation_spec

NO_TOKEN = -1  # fills a row after its end


class Rows(NamedTuple):
    """What is asked for each row of a batch, and how far it has come."""

    remaining_B: jax.Array  # int32: tokens that may still be made; 0: the row has ended
    generated_B: jax.Array  # int32: tokens made so far
    ends_BE: jax.Array  # int32: ids that end the row; NO_TOKEN fills
    keys_B: jax.Array  # random keys; token number i is drawn with fold_in(key, i)
    sampling: SamplingArrays
    counts: TokenCounts


class DecodeState(NamedTuple):
    """A batch in the middle of being continued."""

    cache: KVCache
    logits_BV: jax.Array  # float32, of each row's next token
    rows: Rows


class GeneratedTokens(NamedTuple):
    """Tokens that were made, NO_TOKEN after a row's end, and their logarithms of probability.

    These are of the model's own distribution, before temperature and penalties [nats].
    """

    tokens_Bn: jax.Array
    logprobs_Bn: jax.Array
    top_tokens_BnA: jax.Array  # the A most likely alternatives of each
    top_logprobs_BnA: jax.Array


def init_rows(
    samplings: Sequence[Sampling],
    seeds: Sequence[int],
    max_new_tokens: Sequence[int],
    end_ids: Sequence[Sequence[int]],
    prompts_BV: np.ndarray,
) -> Rows:
    """Returns rows that have not begun; all arguments hold one entry a row.

    Args:
        samplings: how each row's tokens are drawn.
        seeds: of the draws; a row draws the same alone and in company.
        max_new_tokens: after which a row ends.
        end_ids: any of these ends its row, and stands as its last token.
        prompts_BV: bool, the tokens of each row's prompt, for penalties.
    """
    widest = max([1, *map(len, end_ids)])
    ends = [[*ids, *[NO_TOKEN] * (widest - len(ids))] for ids in end_ids]
    keys_B = jax.vmap(jax.random.key)(np.array(seeds, np.uint32))
    return Rows(
        shard_array(np.array(max_new_tokens, np.int32), "B"),
        shard_array(np.zeros(len(seeds), np.int32), "B"),
        shard_array(np.array(ends, np.int32), "BS"),
        jax.reshard(keys_B, activation_spec("B")),
        SamplingArrays(*(shard_array(np.asarray(knob), "B") for knob in stack_sampling(samplings))),
        TokenCounts(
            shard_array(prompts_BV, "BS"), shard_array(np.zeros(prompts_BV.shape, np.int32), "BS")
        ),
    )


@partial(jax.jit, static_argnums=0, static_argnames="slots")
def prefill(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    slots: int,
) -> tuple[KVCache, jax.Array]:
    """Returns a cache of `slots` (T at least) with the prompts, and the logits [B, V] after them.

    Args:
        config: static.
        model: weights of that config.
        tokens_BT: prompts, padded on the right to one length.
        lengths_B: tokens of each, 1 … T.
        slots: of each row, for prompt and continuation.
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
    """Returns the cache with more tokens, and the logits [B, V] after each row's last one."""
    x_BTD, cache = forward_cached(config, model, cache, tokens_BT, lengths_B)
    return cache, last_logits(config, model, x_BTD, lengths_B)


def last_logits(
    config: ModelConfig, model: Llama | UnstackedLlama, x_BTD: jax.Array, lengths_B: jax.Array
) -> jax.Array:
    """Returns the logits [B, V] after the last token of each row, by `hidden_states`."""
    is_last_BT = jnp.arange(x_BTD.shape[1]) == lengths_B[:, None] - 1
    x_BTD = jax.reshard(x_BTD, activation_spec("BSD"))
    last_BTD = jnp.sum(jnp.where(is_last_BT[..., None], x_BTD, 0), axis=1, keepdims=True)
    return output_head(config, model, last_BTD)[:, 0]


@partial(jax.jit, static_argnums=0, static_argnames=("capacity", "top"), donate_argnums=2)
def decode(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    state: DecodeState,
    n: jax.Array | int,
    with_logprobs: jax.Array | bool = False,
    *,
    capacity: int,
    top: int = 0,
) -> tuple[GeneratedTokens, DecodeState]:
    """Returns the next `n` tokens of each row that goes on, and the state after them.

    The loop stops when all rows have ended. The result has `capacity` columns, of which at most `n`
    are used, so that one program serves any `n`. Each row needs one free slot more than tokens.
    Without `with_logprobs` the log-probabilities, and those of the `top` alternatives, are 0.
    """
    B = len(state.rows.remaining_B)

    def ask(logits_BV: jax.Array, token_B: jax.Array) -> tuple[jax.Array, ...]:
        chosen_B, top_logprobs_BA, top_tokens_BA = logprobs_from_logits(logits_BV, token_B, top)
        return placed((chosen_B, top_tokens_BA, top_logprobs_BA))

    def placed(told: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(jax.reshard(x_B_, activation_spec("BS"[: x_B_.ndim])) for x_B_ in told)

    def leave(logits_BV: jax.Array, token_B: jax.Array) -> tuple[jax.Array, ...]:
        return placed(tuple(x_Bn[:, 0] for x_Bn in nothing[1:]))

    def going_on(carry: tuple[jax.Array, GeneratedTokens, DecodeState]) -> jax.Array:
        i, _, state = carry
        return (i < n) & jnp.any(state.rows.remaining_B > 0)

    def one(carry: tuple[jax.Array, GeneratedTokens, DecodeState]):
        i, made, (cache, logits_BV, rows) = carry
        going_B = rows.remaining_B > 0
        keys_B = jax.vmap(jax.random.fold_in)(rows.keys_B, rows.generated_B)
        token_B = sample(rows.sampling, rows.counts, logits_BV, keys_B)
        new = (token_B, *jax.lax.cond(with_logprobs, ask, leave, logits_BV, token_B))
        made = GeneratedTokens(
            *(_column(all_, i, one, going_B) for all_, one in zip(made, new, strict=True))
        )
        rows = advance_rows(rows, token_B)
        cache, logits_BV = extend_cache(
            config, model, cache, token_B[:, None], going_B.astype(jnp.int32)
        )
        return i + 1, made, DecodeState(cache, jax.reshard(logits_BV, activation_spec("BV")), rows)

    def empty(value: float, dtype: type, *more: int) -> jax.Array:
        return jnp.full(
            (B, capacity, *more), value, dtype, out_sharding=activation_spec("BSS"[: 2 + len(more)])
        )

    nothing = GeneratedTokens(
        empty(NO_TOKEN, jnp.int32),
        empty(0.0, jnp.float32),
        empty(NO_TOKEN, jnp.int32, top),
        empty(0.0, jnp.float32, top),
    )
    _, made, state = jax.lax.while_loop(going_on, one, (jnp.int32(0), nothing, state))
    return made, state


def advance_rows(rows: Rows, token_B: jax.Array) -> Rows:
    """Returns the rows after one more token of each that goes on."""
    going_B = rows.remaining_B > 0
    ended_B = jnp.any(token_B[:, None] == rows.ends_BE, axis=1)
    chosen_BV = jnp.arange(rows.counts.generated_BV.shape[1]) == token_B[:, None]
    generated_BV = rows.counts.generated_BV + (chosen_BV & going_B[:, None])
    return rows._replace(
        remaining_B=jnp.where(going_B & ~ended_B, rows.remaining_B - 1, 0),
        generated_B=rows.generated_B + going_B,
        counts=rows.counts._replace(generated_BV=generated_BV),
    )


def _column(
    generated_Bn_: jax.Array, i: jax.Array, new_B_: jax.Array, going_B: jax.Array
) -> jax.Array:
    """Returns what was made with column `i` of the rows that go on."""
    # Under JAX 0.12 a batch of one row may have lost how it is split, over axes of one device.
    dims = "BSS"[: generated_Bn_.ndim]
    old_B_ = jax.lax.dynamic_index_in_dim(generated_Bn_, i, axis=1, keepdims=False)
    old_B_, new_B_ = (jax.reshard(x, activation_spec(dims[:-1])) for x in (old_B_, new_B_))
    going_B_ = going_B.reshape(-1, *(1 for _ in new_B_.shape[1:]))
    kept_B_ = jnp.where(going_B_, new_B_.astype(old_B_.dtype), old_B_)
    generated_Bn_ = jax.lax.dynamic_update_index_in_dim(generated_Bn_, kept_B_, i, axis=1)
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
    """Returns what follows the prompts, up to `max_new_tokens` of each; stops when all have ended.

    >>> prompt = tokenizer.encode("The capital of France", bos=True)
    >>> rows, lengths, seeds = np.array([prompt] * 2), np.array([len(prompt)] * 2), np.arange(2)
    >>> made = lj.generate(config, model, rows, lengths, lj.Sampling(), seeds, max_new_tokens=5)
    >>> made.tokens_Bn.shape
    (2, 5)
    >>> bool((made.logprobs_Bn > -0.5).all())  # it is sure of what it says
    True

    Args:
        config: static.
        model: weights of that config.
        tokens_BT: int32 prompts, padded to one length.
        lengths_B: int32 tokens of each, 1 … T.
        sampling: static; how tokens are drawn, in all rows or in each.
        seeds_B: uint32 seed of each row's draws; a row draws the same alone and in company.
        max_new_tokens: at most so many tokens are added to each row.
        end_ids: any of these ends its row, and stands as its last token.
        top: alternatives that are told of each token.
        left_padded: the padding stands before the prompts, not behind them.
    """
    tokens_BT = as_token_array(config, tokens_BT)
    lengths_B, seeds_B = jnp.asarray(lengths_B), jnp.asarray(seeds_B)
    B, T = tokens_BT.shape
    if left_padded:
        rows_B1, all_B = jnp.arange(B)[:, None], jax.reshard(lengths_B, P(None))
        moved_BT = (jnp.arange(T) - all_B[:, None]) % T
        all_BT = jax.reshard(tokens_BT, P(None, None))
        tokens_BT = all_BT.at[rows_B1, moved_BT].get(out_sharding=activation_spec("BT"))
    ends_E = jnp.array([*end_ids, NO_TOKEN], jnp.int32)
    samplings = (sampling,) * B if isinstance(sampling, Sampling) else sampling
    rows = Rows(
        jnp.full((B,), max_new_tokens, jnp.int32, out_sharding=activation_spec("B")),
        jnp.zeros((B,), jnp.int32, out_sharding=activation_spec("B")),
        jnp.broadcast_to(ends_E, (B, len(ends_E)), out_sharding=activation_spec("BS")),
        jax.reshard(jax.vmap(jax.random.key)(seeds_B), activation_spec("B")),
        SamplingArrays(
            *(
                jax.reshard(jnp.asarray(knob), activation_spec("B"))
                for knob in stack_sampling(samplings)
            )
        ),
        _counts(config, tokens_BT, lengths_B),
    )
    slots = T + max_new_tokens + 1
    cache, logits_BV = prefill(config, model, tokens_BT, lengths_B, slots=slots)
    state = DecodeState(cache, logits_BV, rows)
    made, _ = decode(config, model, state, max_new_tokens, True, capacity=max_new_tokens, top=top)
    return made


def _counts(config: ModelConfig, tokens_BT: jax.Array, lengths_B: jax.Array) -> TokenCounts:
    """Returns the counts of rows that have made nothing yet."""
    shape = len(tokens_BT), config.vocab_size
    none_BV = jnp.zeros(shape, jnp.int32, out_sharding=activation_spec("BS"))

    def add(seen_BV: jax.Array, column: tuple[jax.Array, jax.Array]):
        token_B, there_B = column
        return seen_BV | ((jnp.arange(shape[1]) == token_B[:, None]) & there_B[:, None]), None

    there_BT = jnp.arange(tokens_BT.shape[1]) < lengths_B[:, None]
    columns = (jax.reshard(x, activation_spec("BS")).T for x in (tokens_BT, there_BT))
    prompt_BV, _ = jax.lax.scan(add, none_BV.astype(bool), tuple(columns))
    return TokenCounts(prompt_BV, none_BV)
