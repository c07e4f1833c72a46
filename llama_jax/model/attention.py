"""Causal grouped-query attention that never crosses a segment."""

import jax
import jax.numpy as jnp

from llama_jax.sharding import act

# Into how many blocks the queries of a text are cut. A block meets the keys up to its own end
# only, so 8 of them leave out 7/16 of all scores, and at most 1/8 of them exist at a time.
QUERY_BLOCKS = 8


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
    own. Scores and softmax are float32, and computed again in the backward pass. Each of the K
    key/value heads serves N/K query heads in turn, as in `repeat_kv` of the reference, without
    being repeated.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    whole = isinstance(offset, int)  # where a query stands is known while this is traced
    size = -(-T // QUERY_BLOCKS) if whole else T

    @jax.checkpoint  # or else every block would keep its own copy of the keys up to its end
    def blocks(q_BKGTH, k_BKSH, v_BKSH, segments_BT, segments_BS):
        outs = []
        for start in range(0, T, size):
            at = slice(start, start + size)
            seen = slice(0, min(S, offset + start + size) if whole else S)
            q, k, v = q_BKGTH[:, :, :, at], k_BKSH[:, :, seen], v_BKSH[:, :, seen]
            segments = segments_BT[:, at], segments_BS[:, seen]
            outs.append(_block(q, k, v, *segments, offset + start))
        return jnp.concatenate(outs, axis=3)

    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H, out_sharding=act("BTKGH"))
    # Heads stand before positions: then every product is one of stacked plain matrices.
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    out_BKGTH = blocks(q_BKGTH, k_BKSH, v_BKSH, segments_BT, segments_BS)
    out_BTKGH = out_BKGTH.transpose(0, 3, 1, 2, 4)
    return out_BTKGH.reshape(B, T, N, H, out_sharding=act("BTNH"))


@jax.checkpoint
def _block(q_BKGTH, k_BKSH, v_BKSH, segments_BT, segments_BS, offset) -> jax.Array:
    T, H = q_BKGTH.shape[3:]
    causal_TS = jnp.arange(T)[:, None] + offset >= jnp.arange(k_BKSH.shape[2])
    visible_BTS = causal_TS & (segments_BT[:, :, None] == segments_BS[:, None, :])
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    scores = jnp.where(visible_BTS[:, None, None], scores * H**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype)
    return jnp.einsum("BKGTS,BKSH->BKGTH", weights, v_BKSH)
