"""One row of a running batch: it reads a part of its prompt, begins, and stops."""

from functools import partial

import jax
import jax.numpy as jnp

from llama_jax.family import ModelConfig
from llama_jax.inference.generate import Rows, State, read
from llama_jax.model.transformer import Llama, Unrolled
from llama_jax.sharding import act


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def read_chunk(
    config: ModelConfig,
    model: Llama | Unrolled,
    state: State,
    row: jax.Array,
    tokens_1T: jax.Array,
    length: jax.Array,
    used: jax.Array,
) -> State:
    """Returns the state with `length` more tokens in a row that holds `used`."""

    def taken(x_B_: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x_B_, row, 1, axis=0)

    def put(x_B_: jax.Array, new_1_: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x_B_, new_1_, row, axis=0)

    cache, logits_BV, rows = state
    alone = jax.tree.map(taken, cache)._replace(used_B=_one(used))
    alone, logits_1V = read(config, model, alone, tokens_1T, _one(length))
    return State(jax.tree.map(put, cache, alone), put(logits_BV, logits_1V), rows)


def _one(number: jax.Array) -> jax.Array:
    return jnp.full((1,), number, jnp.int32, out_sharding=act("B"))


@partial(jax.jit, donate_argnums=0)
def started(state: State, row: jax.Array, settings: Rows) -> State:
    """Returns the state with a row that begins to make tokens."""

    def put(x_B_: jax.Array, new_1_: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x_B_, new_1_, row, axis=0)

    return state._replace(rows=jax.tree.map(put, state.rows, settings))


@partial(jax.jit, donate_argnums=0)
def stopped(state: State, row: jax.Array) -> State:
    """Returns the state with a row that makes no more tokens."""
    left_B = jnp.where(jnp.arange(len(state.rows.left_B)) == row, 0, state.rows.left_B)
    return state._replace(rows=state.rows._replace(left_B=left_B))
