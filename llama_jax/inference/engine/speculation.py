"""Speculative decoding by look-up: what followed these words before may follow them again.

The last tokens are looked for earlier in the text; what stood behind them is read in one pass along
with the next token, and kept as far as the model itself would have chosen it (arXiv 2304.04487). A
pass over a few tokens costs an accelerator what one token costs: all weights are read once.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.inference.generate import NO_TOKEN, State
from llama_jax.inference.sampling import Sampling
from llama_jax.inference.stream import begin
from llama_jax.model.transformer import continued, output_head
from llama_jax.model.weights import Llama, Unrolled
from llama_jax.parallel.mesh import place
from llama_jax.parallel.sharding import act

AHEAD = 7  # tokens that are guessed: with the one that is known, 8 are read
_NGRAM = 3  # tokens that are looked for, at most; 2 at least must be found


class _Text(NamedTuple):
    """One text in the middle of being continued, and the tokens of the last dispatch."""

    state: State
    tokens_S: jax.Array  # of the whole text, a slot each
    made_n: jax.Array
    made: jax.Array  # how many of these there are
    passes: jax.Array  # through the model, so far


def guess(tokens_S: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the `AHEAD` tokens that followed the last ones of a text before, and if they did.

    Args:
        tokens_S: int32, the text; room for `AHEAD` tokens and `_NGRAM` is needed.
        used: tokens of the text. Of several places the one that agrees longest is taken, and of
            these the last.
    """
    S = len(tokens_S)
    at_S = jnp.arange(S)
    alike_S = jnp.zeros(S, jnp.int32)
    agrees_S = at_S < used - 1
    for back in range(_NGRAM):
        last = tokens_S[used - 1 - back]
        agrees_S = agrees_S & (at_S >= back) & (jnp.roll(tokens_S, back) == last) & (used > back)
        alike_S = alike_S + agrees_S
    best = jnp.argmax(alike_S * S + at_S * (alike_S > 0))
    found = alike_S[best] >= 2
    return jax.lax.dynamic_slice_in_dim(tokens_S, best + 1, AHEAD), found


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(config: ModelConfig, model: Llama | Unrolled, text: _Text, n: jax.Array | int) -> _Text:
    """Returns the text with `n` more tokens at least, unless it ends."""

    def going_on(text: _Text) -> jax.Array:
        return (text.made < n) & (text.state.rows.left_B[0] > 0)

    def one(text: _Text) -> _Text:
        used = text.state.cache.used_B[0]
        token = jnp.argmax(jax.reshard(text.state.logits_BV, act("BS"))[0]).astype(jnp.int32)
        tokens_S = text.tokens_S.at[used].set(token)
        guessed, found = guess(tokens_S, used + 1)
        alone = partial(_verified, config, model, text.state, token, guessed[:0])
        ahead = partial(_verified, config, model, text.state, token, guessed)
        state, read, kept = jax.lax.cond(found, ahead, alone)
        made_n = jax.lax.dynamic_update_slice_in_dim(text.made_n, read, text.made, 0)
        # What was not kept is written over by what comes next.
        tokens_S = jax.lax.dynamic_update_slice_in_dim(tokens_S, read, used, 0)
        return _Text(state, tokens_S, made_n, text.made + kept, text.passes + 1)

    text = text._replace(made=jnp.int32(0))
    return jax.lax.while_loop(going_on, one, text)


def _verified(
    config: ModelConfig,
    model: Llama | Unrolled,
    state: State,
    token: jax.Array,
    guessed: jax.Array,
) -> tuple[State, jax.Array, jax.Array]:
    """Returns the state after a token and the guesses that hold, these tokens, and their number."""
    cache, _, rows = state
    tokens_T = jnp.concatenate([token[None], guessed])
    T, missing = len(tokens_T), AHEAD + 1 - len(tokens_T)
    x_BTD, after = continued(config, model, cache, tokens_T[None])
    logits_TV = jax.reshard(output_head(config, model, x_BTD), act("BSD"))[0]
    holds_T = jnp.argmax(logits_TV, axis=-1)[: T - 1] == guessed
    kept = 1 + jnp.sum(jnp.cumprod(holds_T))
    ends_T = jnp.any(tokens_T[:, None] == rows.ends_BE[0], axis=1)
    until_end = jnp.where(jnp.any(ends_T), jnp.argmax(ends_T) + 1, T)
    kept = jnp.minimum(jnp.minimum(kept, until_end), rows.left_B[0])
    ended = jnp.any(ends_T & (jnp.arange(T) < kept))
    kept_B = jnp.full((1,), kept, jnp.int32, out_sharding=act("B"))
    logits_1V = jax.lax.dynamic_slice_in_dim(logits_TV, kept - 1, 1)
    state = State(
        after._replace(used_B=cache.used_B + kept_B),
        jax.reshard(logits_1V, act("BV")),
        rows._replace(
            left_B=jnp.where(ended, 0, rows.left_B - kept_B), made_B=rows.made_B + kept_B
        ),
    )
    return state, jnp.pad(tokens_T, (0, missing)), kept


def stream_ahead(
    config: ModelConfig,
    model: Llama | Unrolled,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    end_ids: frozenset[int] = frozenset(),
    block: int = 16,
) -> Iterator[int]:
    """Yields what `stream` yields, the most likely tokens, in fewer passes where a text repeats.

    Raises:
        InputError: as `stream`; or the tokens are to be drawn, or penalised.
    """
    if sampling != Sampling():
        raise InputError(
            "speculation takes the most likely token each time: leave out temperature and penalties"
        )
    state = begin(
        config, model, prompt, max_new_tokens=max_new_tokens, sampling=sampling,
        end_ids=end_ids, seed=0, spare=AHEAD + 1,
    )  # fmt: skip
    tokens = np.full(state.cache.slots + AHEAD + 1, NO_TOKEN, np.int32)
    tokens[: len(prompt)] = prompt
    made = np.full(block + AHEAD + 1, NO_TOKEN, np.int32)
    zeros = (place(np.zeros((), np.int32), "") for _ in range(2))
    text = _Text(state, place(tokens, "S"), place(made, "S"), *zeros)
    left, n = max_new_tokens, 1  # the first token is not kept waiting
    while left > 0:
        text = _decode(config, model, text, n)
        n = block
        new = np.asarray(text.made_n)[: int(text.made)].tolist()
        if not new:
            return
        yield from new
        left -= len(new)
