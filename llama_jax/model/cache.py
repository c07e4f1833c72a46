"""The key/value cache of a batch that is being continued."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.family import ModelConfig
from llama_jax.sharding import act


class Cache(NamedTuple):
    """Keys and values of all layers, written in place (donate it) from slot `used` on.

    Every row of the batch fills its slots together, padding included: a slot's segment tells
    whether it holds a token of the row's text, and attention never crosses segments.
    """

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    segments_BS: jax.Array  # int32; 0 is padding or not yet written
    used: jax.Array  # int32 scalar: slots written so far


def init_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """Returns an empty cache for `batch` rows of at most `slots` tokens, in `config.dtype`."""
    shape = (config.n_layers, batch, slots, config.n_kv_heads, config.head_dim)
    return Cache(
        jnp.zeros(shape, config.dtype, out_sharding=act("LBSKH")),
        jnp.zeros(shape, config.dtype, out_sharding=act("LBSKH")),
        jnp.zeros((batch, slots), jnp.int32, out_sharding=act("BS")),
        jnp.int32(0),
    )
