"""What an engine does with one row of its batch: it reads a prompt in parts, begins, and stops."""

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
)
from llama_jax.inference.logprobs import logprobs_from_hidden
from llama_jax.inference.sampling import Sampling
from llama_jax.model.cache import init_cache
from llama_jax.model.transformer import forward_cached
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import shard_array
from llama_jax.parallel.sharding import activation_spec

DECODE_STEPS = 8  # tokens made in one dispatch when nobody waits

CHUNK_SIZES = (32, 256)  # tokens of a prompt that are read at a time: a program for each

# The next tokens of all rows: one program for any number of them up to DECODE_STEPS.
decode_rows = partial(decode, capacity=DECODE_STEPS, top=MAX_TOP_LOGPROBS)


def init_state(config: ModelConfig, rows: int, slots: int) -> DecodeState:
    """Returns the state of `rows` rows with `slots` slots each, none of which has begun."""
    ends, V = [[NO_TOKEN] * MAX_END_IDS] * rows, config.vocab_size
    prompts_BV = np.zeros((rows, V), bool)
    none = init_rows([Sampling()] * rows, [0] * rows, [0] * rows, ends, prompts_BV)
    cache = jax.jit(init_cache, static_argnums=(0, 1, 2))(config, rows, slots)
    return DecodeState(cache, shard_array(np.zeros((rows, V), np.float32), "BV"), none)


def init_row(config: ModelConfig, request: Request) -> Rows:
    """Returns the row of a request whose prompt has been read."""
    seen = np.zeros((1, config.vocab_size), bool)
    seen[0, list(request.prompt)] = True
    ends = sorted(request.end_ids)
    ends += [NO_TOKEN] * (MAX_END_IDS - len(ends))
    return init_rows([request.sampling], [request.seed], [request.max_new_tokens], [ends], seen)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill_chunk(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    state: DecodeState,
    row: jax.Array,
    tokens_1T: jax.Array,
    length: jax.Array,
    used: jax.Array,
    targets_1T: jax.Array,
    with_logprobs: jax.Array | bool,
) -> tuple[DecodeState, tuple[jax.Array, jax.Array, jax.Array]]:
    """Returns the state with `length` more tokens in a row that holds `used`.

    And the log-probabilities [1, T] of the targets, each after its token, with the ids and the
    log-probabilities [1, T, MAX_TOP_LOGPROBS] of the most likely tokens there; all 0 without
    `with_logprobs`.
    """

    def taken(x_B_: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x_B_, row, 1, axis=0)

    def put(x_B_: jax.Array, new_1_: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x_B_, new_1_, row, axis=0)

    cache, logits_BV, rows = state
    alone = jax.tree.map(taken, cache)._replace(used_B=_one(used))
    x_1TD, alone = forward_cached(config, model, alone, tokens_1T, _one(length))
    logits_1V = last_logits(config, model, x_1TD, _one(length))

    def ask(x_1TD: jax.Array, targets_1T: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        scores = logprobs_from_hidden(config, model, x_1TD, targets_1T, MAX_TOP_LOGPROBS)
        logprobs_1T, top_logprobs_1TA, top_tokens_1TA = scores
        return logprobs_1T, top_tokens_1TA, top_logprobs_1TA

    def leave(x_1TD: jax.Array, targets_1T: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def zeros(dtype: type, *more: int) -> jax.Array:
            dims = "BSS"[: 2 + len(more)]
            return jnp.zeros((*targets_1T.shape, *more), dtype, out_sharding=activation_spec(dims))

        return (
            zeros(jnp.float32),
            zeros(jnp.int32, MAX_TOP_LOGPROBS),
            zeros(jnp.float32, MAX_TOP_LOGPROBS),
        )

    scores = jax.lax.cond(with_logprobs, ask, leave, x_1TD, targets_1T)
    state = DecodeState(jax.tree.map(put, cache, alone), put(logits_BV, logits_1V), rows)
    return state, scores


def _one(number: jax.Array) -> jax.Array:
    return jnp.full((1,), number, jnp.int32, out_sharding=activation_spec("B"))


@partial(jax.jit, donate_argnums=0)
def start_row(state: DecodeState, row: jax.Array, settings: Rows) -> DecodeState:
    """Returns the state with a row that begins to make tokens."""

    def put(x_B_: jax.Array, new_1_: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x_B_, new_1_, row, axis=0)

    return state._replace(rows=jax.tree.map(put, state.rows, settings))


@partial(jax.jit, donate_argnums=0)
def stop_row(state: DecodeState, row: jax.Array) -> DecodeState:
    """Returns the state with a row that makes no more tokens."""
    remaining_B = jnp.where(
        jnp.arange(len(state.rows.remaining_B)) == row, 0, state.rows.remaining_B
    )
    return state._replace(rows=state.rows._replace(remaining_B=remaining_B))


def attach_logprobs(
    ids: Sequence[int],
    logprobs_T: np.ndarray,
    top_tokens_TA: np.ndarray,
    top_logprobs_TA: np.ndarray,
    top: int,
) -> list[GeneratedToken]:
    """Returns tokens with their log-probabilities and those of the `top` most likely ones."""
    logprobs = logprobs_T[: len(ids)].tolist()
    rows = (x_TA[: len(ids), :top].tolist() for x_TA in (top_tokens_TA, top_logprobs_TA))
    return [
        GeneratedToken(token, logprob, tuple(zip(*pairs, strict=True)))
        for token, logprob, *pairs in zip(ids, logprobs, *rows, strict=True)
    ]


def cache_sizes(context: int) -> list[int]:
    """Returns the numbers of slots that a cache may have, ascending.

    A chunk is written whole, so there is room for one behind the longest text. Four times as many
    each, and none near the largest: few programs, each of which costs a start some seconds.
    """
    largest, size = context + CHUNK_SIZES[-1], 2 * CHUNK_SIZES[-1]
    smaller = []
    while 2 * size < largest:
        smaller.append(size)
        size *= 4
    return [*smaller, largest]


def slots_needed(request: Request) -> int:
    """Returns the slots that a request needs."""
    return len(request.prompt) + max(CHUNK_SIZES[-1], request.max_new_tokens + 1)


def common_prefix_length(tokens: Sequence[int], prompt: Sequence[int]) -> int:
    """Returns how many tokens two texts begin with alike."""
    pairs = zip(tokens, prompt, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(prompt)))
