"""The programs that an engine runs on single rows of its batch: prefill a chunk, start, stop.

C copies of the model have equally many rows. A prefill computes a chunk of one row of each copy.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.inference.engine.requests import (
    MAX_END_IDS,
    MAX_TOP_LOGPROBS,
    GeneratedToken,
    Request,
)
from llama_jax.inference.generate import (
    NO_TOKEN,
    DecodeState,
    Rows,
    decode,
    init_rows,
    last_logits,
    sample_next,
)
from llama_jax.inference.logit_limits import init_bias, only_token
from llama_jax.inference.logprobs import logprobs_from_hidden
from llama_jax.inference.sampling import Sampling
from llama_jax.model.cache import KVCache, init_cache, init_paged_cache, page_slots
from llama_jax.model.transformer import forward_cached
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import batch_shards, shard_array
from llama_jax.parallel.rows import RowNumbers, put_rows, take_rows
from llama_jax.parallel.sharding import activation_spec
from llama_jax.runtime.program_store import stored_jit

DECODE_STEPS = 8  # decode steps of one dispatch while no prompt waits for its prefill

CHUNK_SIZES = (32, 256)  # prompt tokens of one prefill dispatch; one program per size

# Decodes all rows: one program for any number of steps up to DECODE_STEPS.
decode_rows = partial(decode, capacity=DECODE_STEPS, top=MAX_TOP_LOGPROBS)


_empty_cache = stored_jit(static_argnums=(0, 1, 2))(init_cache)
_empty_pages = stored_jit(static_argnums=(0, 1, 2, 3))(init_paged_cache)


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


def init_state(config: ModelConfig, rows: int, slots: int, pages: int | None = None) -> DecodeState:
    """Returns a state of `rows` empty rows.

    Args:
        config: the model's config.
        rows: of the batch.
        slots: slots of each row; with pages, of the longest row.
        pages: of the pool of each copy of the model; None: rows own their slots.
    """
    ends, V = [[NO_TOKEN] * MAX_END_IDS] * rows, config.vocab_size
    prompts_BV = np.zeros((rows, V), bool)
    empty_rows = init_rows([Sampling()] * rows, [0] * rows, [0] * rows, ends, prompts_BV)
    empty_rows = empty_rows._replace(bias=init_bias(V, [()] * rows))
    if pages is None:
        cache = _empty_cache(config, rows, slots)
    else:
        sizes = rows, pages * batch_shards(), -(-slots // page_slots(config))
        cache = _empty_pages(config, *sizes)
    return DecodeState(cache, shard_array(np.zeros((rows, V), np.float32), "BV"), empty_rows)


def init_row(config: ModelConfig, request: Request) -> Rows:
    """Returns the row of a request whose prompt is prefilled, once for each copy of the model."""
    C = batch_shards()
    in_prompt_CV = np.zeros((C, config.vocab_size), bool)
    in_prompt_CV[:, list(request.prompt)] = True
    ends = sorted(request.end_ids)
    ends += [NO_TOKEN] * (MAX_END_IDS - len(ends))
    settings = [request.sampling] * C, [request.seed] * C, [request.max_new_tokens] * C
    row = init_rows(*settings, [ends] * C, in_prompt_CV)
    return row._replace(bias=init_bias(config.vocab_size, [request.logit_bias] * C))


@stored_jit(static_argnums=(0, 9), donate_argnums=2)
def prefill_chunk(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    state: DecodeState,
    numbers: RowNumbers,
    tokens_CT: jax.Array,
    lengths_C: jax.Array,
    used_C: jax.Array,
    targets_CT: jax.Array,
    with_logprobs: jax.Array | bool,
    slots: int | None = None,
) -> tuple[DecodeState, tuple[jax.Array, jax.Array, jax.Array]]:
    """Prefills tokens into one row of each copy of the model, of which there are C.

    Args:
        config: static.
        model: weights of that config.
        state: of all rows.
        numbers: of the rows; copies that are not active change nothing.
        tokens_CT: the tokens, padded on the right.
        lengths_C: tokens of each row.
        used_C: tokens that each row has already.
        targets_CT: the token after each.
        with_logprobs: whether to compute log-probabilities.
        slots: static; of a cache in pages, the slots of a row that the tokens may attend to.

    Returns:
        The state, and for each position the log-probability [C, T] of its target and the ids and
        log-probabilities [C, T, MAX_TOP_LOGPROBS] of the most likely next tokens, replicated.
        Without `with_logprobs` ids and log-probabilities are 0.
    """
    cache, logits_BV, rows = state
    row_pages = slots and -(-slots // page_slots(config))
    row_cache = _take_cache(cache, numbers, row_pages)._replace(used_B=used_C)
    x_CTD, row_cache = forward_cached(config, model, row_cache, tokens_CT, lengths_C)
    logits_CV = last_logits(config, model, x_CTD, lengths_C)

    def compute_logprobs(
        x_CTD: jax.Array, targets_CT: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        logprobs_CT, top_logprobs_CTA, top_tokens_CTA = logprobs_from_hidden(
            config, model, x_CTD, targets_CT, MAX_TOP_LOGPROBS
        )
        return logprobs_CT, top_tokens_CTA, top_logprobs_CTA

    def skip_logprobs(
        x_CTD: jax.Array, targets_CT: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        def zeros(dtype: type, *more: int) -> jax.Array:
            dims = "BSS"[: 2 + len(more)]
            return jnp.zeros((*targets_CT.shape, *more), dtype, out_sharding=activation_spec(dims))

        A = MAX_TOP_LOGPROBS
        return zeros(jnp.float32), zeros(jnp.int32, A), zeros(jnp.float32, A)

    found = jax.lax.cond(with_logprobs, compute_logprobs, skip_logprobs, x_CTD, targets_CT)
    logprobs_CT, top_tokens_CTA, top_logprobs_CTA = (
        jax.reshard(x_CT_, activation_spec("SSS"[: x_CT_.ndim])) for x_CT_ in found
    )
    logits_BV = put_rows(logits_BV, logits_CV, numbers)
    cache = _put_cache(cache, row_cache, numbers)
    return DecodeState(cache, logits_BV, rows), (logprobs_CT, top_tokens_CTA, top_logprobs_CTA)


def _take_cache(cache: KVCache, numbers: RowNumbers, row_pages: int | None) -> KVCache:
    """Returns the cache of one row of each copy: its slots, or its first pages and the pool."""
    if cache.pages_BP is None:
        return jax.tree.map(lambda x_B_: take_rows(x_B_, numbers), cache)
    pages_CP = take_rows(cache.pages_BP, numbers)[:, :row_pages]
    return KVCache(cache.layers, take_rows(cache.used_B, numbers), pages_CP)


def _put_cache(cache: KVCache, row_cache: KVCache, numbers: RowNumbers) -> KVCache:
    """Returns the cache with the row of each active copy replaced."""
    if cache.pages_BP is None:
        return jax.tree.map(lambda x_B_, new_C_: put_rows(x_B_, new_C_, numbers), cache, row_cache)
    used_B = put_rows(cache.used_B, row_cache.used_B, numbers)
    return KVCache(row_cache.layers, used_B, cache.pages_BP)


@stored_jit(donate_argnums=0)
def start_row(state: DecodeState, number: RowNumbers, settings_C: Rows) -> DecodeState:
    """Returns the state with the settings of `init_row` in a row, which generates from now on."""
    rows = jax.tree.map(lambda x_B_, new_C_: put_rows(x_B_, new_C_, number), state.rows, settings_C)
    return state._replace(rows=rows)


@stored_jit(donate_argnums=0)
def stop_row(state: DecodeState, row: jax.Array) -> DecodeState:
    """Returns the state with a row that generates no more tokens."""
    remaining_B = jnp.where(
        jnp.arange(len(state.rows.remaining_B)) == row, 0, state.rows.remaining_B
    )
    return state._replace(rows=state.rows._replace(remaining_B=remaining_B))


@stored_jit()
def choose_tokens(
    rows: Rows, logits_BV: jax.Array, mask_BW: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the tokens [B] that `decode_rows` samples next with `mask_BW`, and a mask [B, W].

    The tokens are replicated. The mask allows only them in the rows that `mask_BW` restricts.
    """
    token_B = sample_next(rows, logits_BV, mask_BW)
    return jax.reshard(token_B, activation_spec("S")), only_token(mask_BW, token_B)


def attach_logprobs(
    ids: Sequence[int],
    logprobs_T: np.ndarray,
    top_tokens_TA: np.ndarray,
    top_logprobs_TA: np.ndarray,
    top: int,
) -> list[GeneratedToken]:
    """Returns the tokens `ids` with their log-probabilities and the `top` most likely tokens."""
    logprobs = logprobs_T[: len(ids)].tolist()
    rows = (x_TA[: len(ids), :top].tolist() for x_TA in (top_tokens_TA, top_logprobs_TA))
    return [
        GeneratedToken(token, logprob, tuple(zip(*pairs, strict=True)))
        for token, logprob, *pairs in zip(ids, logprobs, *rows, strict=True)
    ]
