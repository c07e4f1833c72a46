"""Attention in plain JAX, block by block: for every platform; other kernels are held to it."""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.model.cache import LayerCache
from llama_jax.model.remat import save_for_backward
from llama_jax.parallel.collectives import local_text_positions
from llama_jax.parallel.mesh import context_shards

# Queries are taken in blocks, at most 8 of them. A block meets the keys up to its own end only: two
# leave out a quarter of all scores, eight 7/16, and only one block's scores exist at a time.
QUERY_BLOCK = 256


class Visible(NamedTuple):
    """What decides which keys a query sees."""

    positions_BT: jax.Array  # slot of each query (B or 1 rows); it sees the slots up to its own
    segments_BT: jax.Array | None  # of the queries; None: all is one text
    segments_BS: jax.Array | None  # of the keys

    def part(self, at: slice, seen: slice) -> "Visible":
        """Returns it for some of the queries and keys."""
        if self.segments_BT is None or self.segments_BS is None:
            return Visible(self.positions_BT[:, at], None, None)
        segments = self.segments_BT[:, at], self.segments_BS[:, seen]
        return Visible(self.positions_BT[:, at], *segments)


def attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS) -> jax.Array:
    """Returns what this device's queries see of whole texts, [B, T, N, H].

    For use in `jax.shard_map`; keys are in the order of the text, queries in that of the mesh.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # Heads stand before positions: then every product is one of stacked plain matrices.
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    visible = Visible(local_text_positions(T)[None], segments_BT, segments_BS)
    out_BKGTH = _whole_texts(q_BKGTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), visible)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scores(q_BKGTH, k_BKSH, visible: Visible, scale_BKS=None) -> jax.Array:
    visible_BTS = visible.positions_BT[:, :, None] >= jnp.arange(k_BKSH.shape[2])
    if visible.segments_BT is not None and visible.segments_BS is not None:
        visible_BTS &= visible.segments_BT[:, :, None] == visible.segments_BS[:, None, :]
    scores = _product("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH)
    if scale_BKS is not None:
        scores *= scale_BKS[:, :, None, None]
    return jnp.where(visible_BTS[:, None, None], scores, -jnp.inf)


def attend_block(q_BKGTH, k_BKSH, v_BKSH, visible: Visible) -> tuple[jax.Array, jax.Array]:
    """Returns what the queries of a block see, and the logarithm of their softmax's sum."""
    scores = _scores(q_BKGTH, k_BKSH, visible)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    seen = _product("BKGTS,BKSH->BKGTH", weights.astype(v_BKSH.dtype), v_BKSH)
    return (seen / total).astype(v_BKSH.dtype), largest + jnp.log(total)


def attend_cached(q_BKGTH: jax.Array, kept: LayerCache, positions_BT: jax.Array) -> jax.Array:
    """Returns what queries at `positions_BT` see of a cache, [B, K, G, T, H] in q's dtype."""
    dtype = q_BKGTH.dtype
    visible = Visible(positions_BT, None, None)
    scores = _scores(q_BKGTH, kept.k_BKSH.astype(dtype), visible, kept.k_scale_BKS)
    weights = jax.nn.softmax(scores, axis=-1)
    if kept.v_scale_BKS is not None:
        weights *= kept.v_scale_BKS[:, :, None, None]
    seen = _product("BKGTS,BKSH->BKGTH", weights.astype(dtype), kept.v_BKSH.astype(dtype))
    return seen.astype(dtype)


def _cuts(T: int, S: int) -> list[tuple[slice, slice]]:
    """Returns the blocks of queries, each with the keys up to its end.

    Where another device has another part of the sequence, a block's end is not known when the
    program is made: it meets all keys.
    """
    size = max(QUERY_BLOCK, -(-T // 8))
    blocks = [slice(i, min(i + size, T)) for i in range(0, T, size)]
    return [(at, slice(0, at.stop if context_shards() == 1 else S)) for at in blocks]


@jax.custom_vjp
def _whole_texts(q_BKGTH, k_BKSH, v_BKSH, visible: Visible) -> jax.Array:
    return _whole_texts_forward(q_BKGTH, k_BKSH, v_BKSH, visible)[0]


def _whole_texts_forward(q_BKGTH, k_BKSH, v_BKSH, visible: Visible):
    outs, log_sums = [], []
    for at, seen in _cuts(q_BKGTH.shape[3], k_BKSH.shape[2]):
        k, v = k_BKSH[:, :, seen], v_BKSH[:, :, seen]
        out, log_sum = attend_block(q_BKGTH[:, :, :, at], k, v, visible.part(at, seen))
        outs.append(out)
        log_sums.append(log_sum)
    out_BKGTH = save_for_backward("attention", jnp.concatenate(outs, axis=3))
    log_sums = [save_for_backward("attention", log_sum) for log_sum in log_sums]
    return out_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, visible, out_BKGTH, log_sums)


def _whole_texts_backward(residuals, d_out_BKGTH):
    """Makes the weights again from the scores, block by block (arXiv 2205.14135, appendix B)."""
    q_BKGTH, k_BKSH, v_BKSH, visible, out_BKGTH, log_sums = residuals
    S = k_BKSH.shape[2]
    dq, dk_BKHS, dv_BKHS = [], [], []
    # Each row of the softmax's gradient sums to the product of what came out and its gradient.
    sums_BKGT1 = jnp.sum((d_out_BKGTH * out_BKGTH).astype(jnp.float32), axis=-1, keepdims=True)
    for (at, seen), log_sum in zip(_cuts(q_BKGTH.shape[3], S), log_sums, strict=True):
        q, k, v = q_BKGTH[:, :, :, at], k_BKSH[:, :, seen], v_BKSH[:, :, seen]
        d_out = d_out_BKGTH[:, :, :, at]
        weights = jnp.exp(_scores(q, k, visible.part(at, seen)) - log_sum)
        d_weights = _product("BKGTH,BKSH->BKGTS", d_out, v)
        d_scores = (weights * (d_weights - sums_BKGT1[:, :, :, at])).astype(q.dtype)
        dq.append(_product("BKGTS,BKSH->BKGTH", d_scores, k).astype(q.dtype))
        # With H before S it is the small operand that has to be turned, not the scores.
        dk = _product("BKGTH,BKGTS->BKHS", q, d_scores).astype(k.dtype)
        dv = _product("BKGTH,BKGTS->BKHS", d_out, weights.astype(v.dtype)).astype(v.dtype)
        rest = ((0, 0), (0, 0), (0, 0), (0, S - seen.stop))
        dk_BKHS.append(jnp.pad(dk, rest))
        dv_BKHS.append(jnp.pad(dv, rest))
    dk_BKSH, dv_BKSH = (reduce(jnp.add, parts).swapaxes(2, 3) for parts in (dk_BKHS, dv_BKHS))
    return jnp.concatenate(dq, axis=3), dk_BKSH, dv_BKSH, None


_whole_texts.defvjp(_whole_texts_forward, _whole_texts_backward)
