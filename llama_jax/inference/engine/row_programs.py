"""The programs that an engine runs on one row of its batch: prefill a chunk, start, stop."""

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
from llama_jax.model.cache import init_cache
from llama_jax.model.transformer import forward_cached
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import shard_array
from llama_jax.parallel.sharding import activation_spec

DECODE_STEPS = 8  # decode steps of one dispatch while no prompt waits for its prefill

CHUNK_SIZES = (32, 256)  # prompt tokens of one prefill dispatch; one program per size

# Decodes all rows: one program for any number of steps up to DECODE_STEPS.
decode_rows = partial(decode, capacity=DECODE_STEPS, top=MAX_TOP_LOGPROBS)


def init_state(config: ModelConfig, rows: int, slots: int) -> DecodeState:
    """Returns a state of `rows` empty rows with `slots` slots each."""
    ends, V = [[NO_TOKEN] * MAX_END_IDS] * rows, config.vocab_size
    prompts_BV = np.zeros((rows, V), bool)
    empty_rows = init_rows([Sampling()] * rows, [0] * rows, [0] * rows, ends, prompts_BV)
    empty_rows = empty_rows._replace(bias=init_bias(V, [()] * rows))
    cache = jax.jit(init_cache, static_argnums=(0, 1, 2))(config, rows, slots)
    return DecodeState(cache, shard_array(np.zeros((rows, V), np.float32), "BV"), empty_rows)


def init_row(config: ModelConfig, request: Request) -> Rows:
    """Returns the row of a request whose prompt is prefilled, as a batch of one."""
    in_prompt = np.zeros((1, config.vocab_size), bool)
    in_prompt[0, list(request.prompt)] = True
    ends = sorted(request.end_ids)
    ends += [NO_TOKEN] * (MAX_END_IDS - len(ends))
    row = init_rows([request.sampling], [request.seed], [request.max_new_tokens], [ends], in_prompt)
    return row._replace(bias=init_bias(config.vocab_size, [request.logit_bias]))


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
    """Prefills `length` tokens into a row that has `used` tokens.

    Returns:
        The state, and for each position the log-probability [1, T] of its target and the ids and
        log-probabilities [1, T, MAX_TOP_LOGPROBS] of the most likely next tokens. Without
        `with_logprobs` ids and log-probabilities are 0.
    """

    def take_row(x_B_: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x_B_, row, 1, axis=0)

    cache, logits_BV, rows = state
    row_cache = jax.tree.map(take_row, cache)._replace(used_B=_as_batch(used))
    x_1TD, row_cache = forward_cached(config, model, row_cache, tokens_1T, _as_batch(length))
    logits_1V = last_logits(config, model, x_1TD, _as_batch(length))

    def compute_logprobs(
        x_1TD: jax.Array, targets_1T: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        logprobs_1T, top_logprobs_1TA, top_tokens_1TA = logprobs_from_hidden(
            config, model, x_1TD, targets_1T, MAX_TOP_LOGPROBS
        )
        return logprobs_1T, top_tokens_1TA, top_logprobs_1TA

    def skip_logprobs(
        x_1TD: jax.Array, targets_1T: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        def zeros(dtype: type, *more: int) -> jax.Array:
            dims = "BSS"[: 2 + len(more)]
            return jnp.zeros((*targets_1T.shape, *more), dtype, out_sharding=activation_spec(dims))

        A = MAX_TOP_LOGPROBS
        return zeros(jnp.float32), zeros(jnp.int32, A), zeros(jnp.float32, A)

    logprobs = jax.lax.cond(with_logprobs, compute_logprobs, skip_logprobs, x_1TD, targets_1T)
    cache = jax.tree.map(partial(_put_row, row), cache, row_cache)
    return DecodeState(cache, _put_row(row, logits_BV, logits_1V), rows), logprobs


def _put_row(row: jax.Array, x_B_: jax.Array, new_1_: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x_B_, new_1_, row, axis=0)


def _as_batch(number: jax.Array) -> jax.Array:
    return jnp.full((1,), number, jnp.int32, out_sharding=activation_spec("B"))


@partial(jax.jit, donate_argnums=0)
def start_row(state: DecodeState, row: jax.Array, settings: Rows) -> DecodeState:
    """Returns the state with `settings` in a row, which generates tokens from now on."""
    return state._replace(rows=jax.tree.map(partial(_put_row, row), state.rows, settings))


@partial(jax.jit, donate_argnums=0)
def stop_row(state: DecodeState, row: jax.Array) -> DecodeState:
    """Returns the state with a row that generates no more tokens."""
    remaining_B = jnp.where(
        jnp.arange(len(state.rows.remaining_B)) == row, 0, state.rows.remaining_B
    )
    return state._replace(rows=state.rows._replace(remaining_B=remaining_B))


@jax.jit
def choose_tokens(
    rows: Rows, logits_BV: jax.Array, mask_BW: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the tokens [B] that `decode_rows` samples next with `mask_BW`, and a mask [B, W].

    The mask allows only these tokens in the rows that `mask_BW` restricts.
    """
    token_B = sample_next(rows, logits_BV, mask_BW)
    return token_B, only_token(mask_BW, token_B)


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
