"""Causal grouped-query attention that never crosses a segment."""

from functools import reduce

import jax
import jax.numpy as jnp

from llama_jax.sharding import act

# Queries are taken in blocks, at most 8 of them. A block meets the keys up to its own end only: two
# leave out a quarter of all scores, eight 7/16, and only one block's scores exist at a time.
QUERY_BLOCK = 256


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
    q_BTNH = jax.reshard(q_BTNH, act("BTNH"))
    k_BSKH, v_BSKH = (jax.reshard(x, act("BSKH")) for x in (k_BSKH, v_BSKH))
    segments_BT = jax.reshard(segments_BT, act("BT"))
    segments_BS = jax.reshard(segments_BS, act("BS"))
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # Heads stand before positions: then every product is one of stacked plain matrices.
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H, out_sharding=act("BTKGH"))
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    if isinstance(offset, int) and offset == 0 and k_BSKH.shape[1] == T:
        out_BKGTH = _whole_texts(q_BKGTH, k_BKSH, v_BKSH, segments_BT)
    else:
        out_BKGTH, _ = _block(q_BKGTH, k_BKSH, v_BKSH, segments_BT, segments_BS, offset)
    out_BTKGH = out_BKGTH.transpose(0, 3, 1, 2, 4)
    return out_BTKGH.reshape(B, T, N, H, out_sharding=act("BTNH"))


def _scores(q_BKGTH, k_BKSH, segments_BT, segments_BS, offset) -> jax.Array:
    T, H = q_BKGTH.shape[3:]
    causal_TS = jnp.arange(T)[:, None] + offset >= jnp.arange(k_BKSH.shape[2])
    visible_BTS = causal_TS & (segments_BT[:, :, None] == segments_BS[:, None, :])
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    return jnp.where(visible_BTS[:, None, None], scores * H**-0.5, -jnp.inf)


def _block(q_BKGTH, k_BKSH, v_BKSH, segments_BT, segments_BS, offset):
    """Returns what the queries of a block see, and the logarithm of their softmax's sum."""
    scores = _scores(q_BKGTH, k_BKSH, segments_BT, segments_BS, offset)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    seen = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v_BKSH.dtype), v_BKSH)
    return (seen / total).astype(seen.dtype), largest + jnp.log(total)


def _cuts(T: int) -> list[tuple[slice, slice]]:
    """Returns the blocks of queries, each with the keys up to its end."""
    size = max(QUERY_BLOCK, -(-T // 8))
    return [(slice(i, min(i + size, T)), slice(0, min(i + size, T))) for i in range(0, T, size)]


@jax.custom_vjp
def _whole_texts(q_BKGTH, k_BKSH, v_BKSH, segments_BT) -> jax.Array:
    return _whole_texts_forward(q_BKGTH, k_BKSH, v_BKSH, segments_BT)[0]


def _whole_texts_forward(q_BKGTH, k_BKSH, v_BKSH, segments_BT):
    outs, log_sums = [], []
    for at, seen in _cuts(q_BKGTH.shape[3]):
        k, v = k_BKSH[:, :, seen], v_BKSH[:, :, seen]
        segments = segments_BT[:, at], segments_BT[:, seen]
        out, log_sum = _block(q_BKGTH[:, :, :, at], k, v, *segments, at.start)
        outs.append(out)
        log_sums.append(log_sum)
    out_BKGTH = jnp.concatenate(outs, axis=3)
    return out_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, segments_BT, out_BKGTH, log_sums)


def _whole_texts_backward(residuals, d_out_BKGTH):
    """Makes the weights again from the scores, block by block (arXiv 2205.14135, appendix B)."""
    q_BKGTH, k_BKSH, v_BKSH, segments_BT, out_BKGTH, log_sums = residuals
    H = q_BKGTH.shape[-1]
    S = k_BKSH.shape[2]
    dq, dk_BKHS, dv_BKHS = [], [], []
    # Each row of the softmax's gradient sums to the product of what came out and its gradient.
    sums_BKGT1 = jnp.sum((d_out_BKGTH * out_BKGTH).astype(jnp.float32), axis=-1, keepdims=True)
    for (at, seen), log_sum in zip(_cuts(q_BKGTH.shape[3]), log_sums, strict=True):
        q, k, v = q_BKGTH[:, :, :, at], k_BKSH[:, :, seen], v_BKSH[:, :, seen]
        d_out = d_out_BKGTH[:, :, :, at]
        segments = segments_BT[:, at], segments_BT[:, seen]
        weights = jnp.exp(_scores(q, k, *segments, at.start) - log_sum)
        d_weights = jnp.einsum("BKGTH,BKSH->BKGTS", d_out, v, preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - sums_BKGT1[:, :, :, at]) * H**-0.5).astype(q.dtype)
        dq.append(jnp.einsum("BKGTS,BKSH->BKGTH", d_scores, k))
        # With H before S it is the small operand that has to be turned, not the scores.
        dk = jnp.einsum("BKGTH,BKGTS->BKHS", q, d_scores)
        dv = jnp.einsum("BKGTH,BKGTS->BKHS", d_out, weights.astype(v.dtype))
        rest = ((0, 0), (0, 0), (0, 0), (0, S - seen.stop))
        dk_BKHS.append(jnp.pad(dk, rest))
        dv_BKHS.append(jnp.pad(dv, rest))
    dk_BKSH, dv_BKSH = (reduce(jnp.add, parts).swapaxes(2, 3) for parts in (dk_BKHS, dv_BKHS))
    return jnp.concatenate(dq, axis=3), dk_BKSH, dv_BKSH, None


_whole_texts.defvjp(_whole_texts_forward, _whole_texts_backward)
