"""Causal grouped-query attention that never crosses a segment."""

import jax
import jax.numpy as jnp

from llama_jax.sharding import act


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array,
    segments_BS: jax.Array,
    offset: jax.Array | int = 0,
) -> jax.Array:
    """Returns softmax(q·k / √H) v of the visible keys, [B, T, N, H] in q's dtype.

    Query t stands at key slot `offset` + t. It sees the slots up to its own whose segment is its
    own. Scores and softmax are float32. Each of the K key/value heads serves N/K query heads in
    turn, as in `repeat_kv` of the reference, without being repeated.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    at = jnp.arange(T) + offset
    causal_TS = at[:, None] >= jnp.arange(S)
    visible_BTS = causal_TS & (segments_BT[:, :, None] == segments_BS[:, None, :])
    q = q_BTNH.reshape(B, T, K, N // K, H, out_sharding=act("BTKGH"))
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k_BSKH, preferred_element_type=jnp.float32)
    scores = jnp.where(visible_BTS[:, None, None], scores * H**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH)
    return out.reshape(B, T, N, H, out_sharding=act("BTNH"))
