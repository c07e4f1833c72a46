"""The programs that an engine runs on single rows of its batch: prefill a chunk, start, stop.

C copies of the model each have as many rows; a chunk of one row of each is prefilled at a time.
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
from llama_jax.model.cache import init_cache
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


def init_state(config: ModelConfig, rows: int, slots: int) -> DecodeState:
    """Returns a state of `rows` empty rows with `slots` slots each."""
    ends, V = [[NO_TOKEN] * MAX_END_IDS] * rows, config.vocab_size
    prompts_BV = np.zeros((rows, V), bool)
    empty_rows = init_rows([Sampling()] * rows, [0] * rows, [0] * rows, ends, prompts_BV)
    empty_rows = empty_rows._replace(bias=init_bias(V, [()] * rows))
    cache = _empty_cache(config, rows, slots)
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


@stored_jit(static_argnums=0, donate_argnums=2)
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

    Returns:
        The state, and for each position the log-probability [C, T] of its target and the ids and
        log-probabilities [C, T, MAX_TOP_LOGPROBS] of the most likely next tokens, replicated.
        Without `with_logprobs` ids and log-probabilities are 0.
    """
    cache, logits_BV, rows = state
    row_cache = jax.tree.map(lambda x_B_: take_rows(x_B_, numbers), cache)._replace(used_B=used_C)
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
    cache, logits_BV = jax.tree.map(
        lambda x_B_, new_C_: put_rows(x_B_, new_C_, numbers),
        (cache, logits_BV),
        (row_cache, logits_CV),
    )
    return DecodeState(cache, logits_BV, rows), (logprobs_CT, top_tokens_CTA, top_logprobs_CTA)


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
