"""Continuing texts: prefill of the prompts, then cached decoding."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.errors import InputError
from llama_jax.family import ModelConfig
from llama_jax.inference.sampling import Sampling, sample
from llama_jax.model.cache import Cache, init_cache
from llama_jax.model.transformer import Llama, hidden_states, output_head
from llama_jax.sharding import act, place

NO_TOKEN = -1  # fills a row after its end


class DecodeState(NamedTuple):
    """A batch in the middle of being continued."""

    cache: Cache
    logits_BV: jax.Array  # of the next token
    positions_B: jax.Array  # of the next token
    ended_B: jax.Array
    step: jax.Array  # tokens made so far
    key: jax.Array


@partial(jax.jit, static_argnums=0, static_argnames="slots")
def prefill(
    config: ModelConfig,
    model: Llama,
    tokens_BT: jax.Array,
    mask_BT: jax.Array,
    key: jax.Array,
    *,
    slots: int,
) -> DecodeState:
    """Returns the state after the prompts. See `generate` for the arguments.

    Args:
        slots: size of the cache: at least T and the tokens to come [tokens].
    """
    B, T = tokens_BT.shape
    mask_BT = jax.reshard(mask_BT, act("BS"))
    segments_BT = mask_BT.astype(jnp.int32)
    counted_BT = jnp.cumsum(segments_BT, axis=1)
    cache = init_cache(config, B, slots)
    positions_BT = jnp.maximum(counted_BT - 1, 0)
    x_BTD, cache = hidden_states(config, model, tokens_BT, positions_BT, segments_BT, cache)
    assert cache is not None
    last_B = jnp.max(jnp.where(mask_BT, jnp.arange(T), 0), axis=1)
    is_last_BT = jnp.arange(T) == last_B[:, None]
    x_BTD = jax.reshard(x_BTD, act("BSD"))
    last_BTD = jnp.sum(jnp.where(is_last_BT[..., None], x_BTD, 0), axis=1, keepdims=True)
    logits_BV = output_head(config, model, last_BTD)[:, 0]
    ended_B = jnp.zeros((B,), bool, out_sharding=act("B"))
    return DecodeState(cache, logits_BV, counted_BT[:, -1], ended_B, jnp.int32(0), key)


@partial(jax.jit, static_argnums=0, static_argnames=("n", "sampling", "end_ids"), donate_argnums=2)
def decode(
    config: ModelConfig,
    model: Llama,
    state: DecodeState,
    *,
    n: int,
    sampling: Sampling,
    end_ids: tuple[int, ...],
) -> tuple[jax.Array, DecodeState]:
    """Returns the next `n` tokens [B, n] and the state after them; stops when all rows ended.

    Token number i of a row is drawn with fold_in(key, i): the same in blocks of any size.
    """
    B = state.positions_B.shape[0]

    def going_on(carry: tuple[jax.Array, jax.Array, DecodeState]) -> jax.Array:
        i, _, state = carry
        return (i < n) & ~jnp.all(state.ended_B)

    def one(carry: tuple[jax.Array, jax.Array, DecodeState]):
        i, made_Bn, state = carry
        drawn_B = sample(sampling, state.logits_BV, jax.random.fold_in(state.key, state.step))
        made_B = jnp.where(state.ended_B, NO_TOKEN, drawn_B)
        made_Bn = jax.lax.dynamic_update_slice(made_Bn, made_B[:, None], (0, i))
        ended_B = state.ended_B
        for end in end_ids:
            ended_B = ended_B | (drawn_B == end)
        x_B1D, cache = hidden_states(
            config, model, drawn_B[:, None], state.positions_B[:, None], cache=state.cache
        )
        assert cache is not None
        logits_BV = output_head(config, model, x_B1D)[:, 0]
        after = state.positions_B + 1
        state = DecodeState(cache, logits_BV, after, ended_B, state.step + 1, state.key)
        return i + 1, made_Bn, state

    empty_Bn = jnp.full((B, n), NO_TOKEN, jnp.int32, out_sharding=act("BS"))
    _, made_Bn, state = jax.lax.while_loop(going_on, one, (jnp.int32(0), empty_Bn, state))
    return made_Bn, state


@partial(jax.jit, static_argnums=0, static_argnames=("max_new_tokens", "sampling", "end_ids"))
def generate(
    config: ModelConfig,
    model: Llama,
    tokens_BT: jax.Array,
    mask_BT: jax.Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    end_ids: tuple[int, ...] = (),
) -> jax.Array:
    """Returns what follows the prompts, int32 [B, max_new_tokens], NO_TOKEN after a row's end.

    Args:
        config: static.
        model: weights of that config.
        tokens_BT: prompts, padded on either side to one length; rows need not be equally long.
        mask_BT: True on the tokens of a prompt, at least one a row; False on padding.
        key: random key; a greedy `sampling` does not use it.
        max_new_tokens: at most so many tokens are added to each row.
        sampling: how tokens are drawn; the default is greedy.
        end_ids: any of these ends its row, and stands as its last token.
    """
    slots = tokens_BT.shape[1] + max_new_tokens
    state = prefill(config, model, tokens_BT, mask_BT, key, slots=slots)
    made, _ = decode(config, model, state, n=max_new_tokens, sampling=sampling, end_ids=end_ids)
    return made


def stream(
    config: ModelConfig,
    model: Llama,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    end_ids: frozenset[int] = frozenset(),
    seed: int = 0,
    block: int = 8,
) -> Iterator[int]:
    """Yields the tokens that follow one prompt as they are made; those that `generate` gives.

    Prompt and cache are padded to powers of two, so that few programs are compiled.

    Args:
        prompt: token ids, at least one.
        block: tokens made in one dispatch.

    Raises:
        InputError: the prompt is empty, holds unknown ids, or doesn't fit the model's context.
    """
    if not prompt:
        raise InputError("the prompt is empty: give at least the begin-of-text token")
    strange = [i for i in prompt if not 0 <= i < config.vocab_size]
    if strange:
        raise InputError(
            f"token {strange[0]} of the prompt is outside the model's vocabulary of"
            f" {config.vocab_size}: the tokenizer is not this model's"
        )
    if len(prompt) + max_new_tokens > config.context:
        raise InputError(
            f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones don't fit the model's"
            f" context of {config.context}: shorten the prompt or ask for fewer"
        )
    padding = _power_of_two(len(prompt)) - len(prompt)
    tokens = np.array([[0] * padding + list(prompt)], np.int32)
    mask = np.arange(tokens.shape[1])[None] >= padding
    blocks = -(-max_new_tokens // block)
    slots = _power_of_two(tokens.shape[1] + blocks * block)
    key = jax.random.key(seed)
    state = prefill(config, model, place(tokens, "BT"), place(mask, "BT"), key, slots=slots)
    ends = tuple(sorted(end_ids))
    left = max_new_tokens
    for _ in range(blocks):
        made, state = decode(config, model, state, n=block, sampling=sampling, end_ids=ends)
        for token in np.asarray(made)[0, :left].tolist():
            if token == NO_TOKEN:
                return
            yield token
        left -= block


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
