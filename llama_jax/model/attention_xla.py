"""Attention in plain JAX, one block of queries at a time, for every platform.

The tests compare the other kernels with this one.
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.model.cache import PAGE, LayerCache, from_stored
from llama_jax.model.remat import save_for_backward
from llama_jax.parallel.collectives import local_text_positions
from llama_jax.parallel.mesh import context_shards

# Queries are processed in at most 8 blocks. A block has scores only for the keys up to its end: 2
# blocks skip 1/4 of all scores, 8 blocks 7/16. Only one block's scores exist at a time.
QUERY_BLOCK = 256


class Mask(NamedTuple):
    """Determines which keys a query attends to: earlier ones, of its own segment or branch."""

    positions_BT: jax.Array  # key slot of each query (B or 1 rows); it attends up to this slot
    segments_BT: jax.Array | None = None  # of the queries; None: each row is one text
    segments_BS: jax.Array | None = None  # of the keys
    ends_BS: jax.Array | None = None  # slot after the last query that may attend to each key

    def block(self, queries: slice, keys: slice) -> "Mask":
        """Returns the mask of some of the queries and keys."""

        def take(x: jax.Array | None, columns: slice) -> jax.Array | None:
            return x if x is None else x[:, columns]

        return Mask(
            self.positions_BT[:, queries],
            take(self.segments_BT, queries),
            take(self.segments_BS, keys),
            take(self.ends_BS, keys),
        )


def attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, ends_BS=None) -> jax.Array:
    """Returns the attention output of this device's queries, [B, T, N, H].

    For use in `jax.shard_map`. Keys are in text order, queries in the mesh's balanced order.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # With heads before positions, each einsum is a batched matrix product without a transpose.
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    mask = Mask(local_text_positions(T)[None], segments_BT, segments_BS, ends_BS)
    out_BKGTH = _blockwise(q_BKGTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), mask)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scores(q_BKGTH, k_BKSH, mask: Mask, scale_BKS=None) -> jax.Array:
    """Returns q·k [B, K, G, T, S] float32, -inf where the mask excludes a key."""
    attended_BTS = mask.positions_BT[:, :, None] >= jnp.arange(k_BKSH.shape[2])
    if mask.segments_BT is not None and mask.segments_BS is not None:
        attended_BTS &= mask.segments_BT[:, :, None] == mask.segments_BS[:, None, :]
    if mask.ends_BS is not None:
        attended_BTS &= mask.positions_BT[:, :, None] < mask.ends_BS[:, None, :]
    scores = _einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH)
    if scale_BKS is not None:
        scores *= scale_BKS[:, :, None, None]
    return jnp.where(attended_BTS[:, None, None], scores, -jnp.inf)


def _attend_block(q_BKGTH, k_BKSH, v_BKSH, mask: Mask) -> tuple[jax.Array, jax.Array]:
    """Returns a block's attention output, and the log of its softmax denominator."""
    scores = _scores(q_BKGTH, k_BKSH, mask)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weighted_sum = _einsum("BKGTS,BKSH->BKGTH", weights.astype(v_BKSH.dtype), v_BKSH)
    return (weighted_sum / total).astype(v_BKSH.dtype), largest + jnp.log(total)


def attend_cached(q_BKGTH: jax.Array, cache: LayerCache, positions_BT: jax.Array) -> jax.Array:
    """Returns the attention output over a KV cache, [B, K, G, T, H] in q's dtype.

    A query attends to the slots 0 … its position.
    """
    dtype = q_BKGTH.dtype
    mask = Mask(positions_BT)
    scores = _scores(q_BKGTH, cache.k_BKSH.astype(dtype), mask, cache.k_scale_BKS)
    weights = jax.nn.softmax(scores, axis=-1)
    if cache.v_scale_BKS is not None:
        weights *= cache.v_scale_BKS[:, :, None, None]
    out_BKGTH = _einsum("BKGTS,BKSH->BKGTH", weights.astype(dtype), cache.v_BKSH.astype(dtype))
    return out_BKGTH.astype(dtype)


def attend_cached_blocks(
    q_BKGTH: jax.Array,
    cache: LayerCache,
    positions_BT: jax.Array,
    pages_BP: jax.Array | None = None,
) -> jax.Array:
    """Returns `attend_cached`; reads the cache in blocks, up to the last that any query attends to.

    For use in `jax.shard_map`. The softmax is updated block by block (arXiv 2205.14135, section
    2), and a block that the mask excludes completely changes no bit. So the result of a row does
    not depend on how long the other rows are.
    """
    slots = cache.k_BKSH.shape[2] * (1 if pages_BP is None else pages_BP.shape[1])
    size, dtype = min(PAGE, slots), q_BKGTH.dtype

    def block(i: jax.Array, start: jax.Array) -> LayerCache:
        if pages_BP is not None:
            pages_B = jax.lax.dynamic_index_in_dim(pages_BP, i, axis=1, keepdims=False)
            return jax.tree.map(lambda pool_BKS_: pool_BKS_[pages_B], cache)
        return jax.tree.map(
            lambda x_BKS_: jax.lax.dynamic_slice_in_dim(x_BKS_, start, size, axis=2), cache
        )

    def add_block(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest, total, out = carry
        start = jnp.minimum(i * size, slots - size)  # the last block may overlap the one before
        part = block(i, start)
        scores = _scores(
            q_BKGTH, from_stored(part.k_BKSH, dtype), Mask(positions_BT - start), part.k_scale_BKS
        )
        scores = jnp.where(start + jnp.arange(size) >= i * size, scores, -jnp.inf)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
        rescale, weights = jnp.exp(largest - new_largest), jnp.exp(scores - new_largest)
        total = total * rescale + jnp.sum(weights, axis=-1, keepdims=True)
        if part.v_scale_BKS is not None:
            weights *= part.v_scale_BKS[:, :, None, None]
        new = _einsum("BKGTS,BKSH->BKGTH", weights.astype(dtype), from_stored(part.v_BKSH, dtype))
        return new_largest, total, out * rescale + new

    ones = (*q_BKGTH.shape[:-1], 1)
    carry = jnp.full(ones, -jnp.inf), jnp.zeros(ones), jnp.zeros(q_BKGTH.shape)
    n_blocks = jnp.max(positions_BT) // size + 1
    _, total, out_BKGTH = jax.lax.fori_loop(0, n_blocks, add_block, carry)
    return (out_BKGTH / total).astype(dtype)


def _blocks(T: int, S: int) -> list[tuple[slice, slice]]:
    """Returns the blocks of queries, each with its keys: those up to the block's end.

    If the mesh splits the sequence, the text positions of a block depend on the device and are not
    known at trace time. Then each block has all keys.
    """
    size = max(QUERY_BLOCK, -(-T // 8))
    blocks = [slice(i, min(i + size, T)) for i in range(0, T, size)]
    return [(block, slice(0, block.stop if context_shards() == 1 else S)) for block in blocks]


@jax.custom_vjp
def _blockwise(q_BKGTH, k_BKSH, v_BKSH, mask: Mask) -> jax.Array:
    return _blockwise_forward(q_BKGTH, k_BKSH, v_BKSH, mask)[0]


def _blockwise_forward(q_BKGTH, k_BKSH, v_BKSH, mask: Mask):
    outs, log_sums = [], []
    for queries, keys in _blocks(q_BKGTH.shape[3], k_BKSH.shape[2]):
        q, k, v = q_BKGTH[:, :, :, queries], k_BKSH[:, :, keys], v_BKSH[:, :, keys]
        out, log_sum = _attend_block(q, k, v, mask.block(queries, keys))
        outs.append(out)
        log_sums.append(log_sum)
    out_BKGTH = save_for_backward("attention", jnp.concatenate(outs, axis=3))
    log_sums = [save_for_backward("attention", log_sum) for log_sum in log_sums]
    return out_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, mask, out_BKGTH, log_sums)


def _blockwise_backward(residuals, d_out_BKGTH):
    """Recomputes the softmax from the scores, block by block (arXiv 2205.14135, appendix B)."""
    q_BKGTH, k_BKSH, v_BKSH, mask, out_BKGTH, log_sums = residuals
    S = k_BKSH.shape[2]
    dq, dk_BKHS, dv_BKHS = [], [], []
    # Σ_s softmax · d_softmax of each query equals d_out · out, which needs no scores.
    sums_BKGT1 = jnp.sum((d_out_BKGTH * out_BKGTH).astype(jnp.float32), axis=-1, keepdims=True)
    for (queries, keys), log_sum in zip(_blocks(q_BKGTH.shape[3], S), log_sums, strict=True):
        q, k, v = q_BKGTH[:, :, :, queries], k_BKSH[:, :, keys], v_BKSH[:, :, keys]
        d_out = d_out_BKGTH[:, :, :, queries]
        weights = jnp.exp(_scores(q, k, mask.block(queries, keys)) - log_sum)
        d_weights = _einsum("BKGTH,BKSH->BKGTS", d_out, v)
        d_scores = (weights * (d_weights - sums_BKGT1[:, :, :, queries])).astype(q.dtype)
        dq.append(_einsum("BKGTS,BKSH->BKGTH", d_scores, k).astype(q.dtype))
        # With H before S the compiler transposes the small operand, not the scores.
        dk = _einsum("BKGTH,BKGTS->BKHS", q, d_scores).astype(k.dtype)
        dv = _einsum("BKGTH,BKGTS->BKHS", d_out, weights.astype(v.dtype)).astype(v.dtype)
        padding = ((0, 0), (0, 0), (0, 0), (0, S - keys.stop))
        dk_BKHS.append(jnp.pad(dk, padding))
        dv_BKHS.append(jnp.pad(dv, padding))
    dk_BKSH, dv_BKSH = (reduce(jnp.add, parts).swapaxes(2, 3) for parts in (dk_BKHS, dv_BKHS))
    return jnp.concatenate(dq, axis=3), dk_BKSH, dv_BKSH, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
