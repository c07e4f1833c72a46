"""Attention of new tokens over the slots of a KV cache: a Pallas kernel for TPU.

Keys and values stream through the matrix unit, up to the last slot that a query attends to: slots
that a row doesn't use yet are not read. The softmax is accumulated block by block (arXiv
2205.14135), so no scores are materialized. On other platforms the kernel is interpreted (slow).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llama_jax.model.cache import LayerCache
from llama_jax.parallel.mesh import LANES, platform

# Decode: bytes of the keys in a block, and of the values. On v5e, reading both takes 1,900 cycles;
# the kernel's code for a block has 690 instructions, which run meanwhile.
BLOCK_BYTES = 1 << 19
# Prefill: queries of a key/value head and slots in a block. Its scores take 2 MiB of VMEM.
QUERY_ROWS, SLOTS = 1024, 512


def attention(q_BTKGH: jax.Array, cache: LayerCache, position_B: jax.Array) -> jax.Array:
    """Returns softmax(q·k) v of this device's rows and heads, [B, T, K, G, H] in q's dtype.

    For use in `jax.shard_map`. Query t of a row attends to the slots 0 … position + t.
    """
    B, T, K, G, H = q_BTKGH.shape
    S, itemsize = cache.k_BKSH.shape[2], cache.k_BKSH.dtype.itemsize
    if T == 1:  # one program computes all heads of a row, because a block of keys is small
        size = _block_size(S, K * H * itemsize)
        return _attend(q_BTKGH[:, 0], cache, position_B, G, size)[:, None]
    # A program computes one head of a block of queries.
    tokens = min(T, max(1, QUERY_ROWS // G))
    n = -(-T // tokens)
    q_BTKGH = jnp.pad(q_BTKGH, [(0, 0), (0, n * tokens - T), (0, 0), (0, 0), (0, 0)])
    q_BKntGH = q_BTKGH.reshape(B, n, tokens, K, G, H).transpose(0, 3, 1, 2, 4, 5)
    start_BKn = position_B[:, None, None] + np.arange(n) * tokens
    start_BKn = jnp.broadcast_to(start_BKn, (B, K, n))
    heads = jax.tree.map(lambda x_BKS_: x_BKS_.reshape(B * K, 1, *x_BKS_.shape[2:]), cache)
    q = q_BKntGH.reshape(B * K * n, 1, tokens * G, H)
    out = _attend(q, heads, start_BKn.reshape(-1), G, min(S, SLOTS))
    out_BntKGH = out.reshape(B, K, n, tokens, G, H).transpose(0, 2, 3, 1, 4, 5)
    return out_BntKGH.reshape(B, n * tokens, K, G, H)[:, :T]


def _attend(
    q_RKMH: jax.Array, cache: LayerCache, start_R: jax.Array, G: int, size: int
) -> jax.Array:
    """Calls the kernel. Each row of the cache has R / B consecutive rows of queries.

    Args:
        q_RKMH: M queries, of M / G tokens.
        cache: of B rows.
        start_R: position of the first token.
        G: queries of a token.
        size: slots of a block.
    """
    (R, K, M, H), (B, _, S, _) = q_RKMH.shape, cache.k_BKSH.shape
    tokens, per_row = M // G, R // B

    def row(r, block, start_R):
        return r, 0, 0, 0

    def slots(r, block, start_R):
        # Beyond the last slot that is attended to the block stays the same, and is not read again.
        return r // per_row, 0, jnp.minimum(block, (start_R[r] + tokens - 1) // size), 0

    def scales(r, block, start_R):
        return slots(r, block, start_R)[:3]

    is_int8 = cache.k_scale_BKS is not None
    token_M1 = np.repeat(np.arange(tokens, dtype=np.int32), G)[:, None]
    specs = [
        pl.BlockSpec((M, 1), lambda r, block, start_R: (0, 0)),
        pl.BlockSpec((1, K, M, H), row),
        *[pl.BlockSpec((1, K, size, H), slots)] * 2,
        *[pl.BlockSpec((1, K, size), scales)] * (2 if is_int8 else 0),
    ]
    slot_bytes = sum(x.nbytes for x in jax.tree.leaves(cache)) // (B * S)
    return pl.pallas_call(
        partial(_kernel, tokens=tokens, size=size, S=S, is_int8=is_int8),
        out_shape=jax.ShapeDtypeStruct(q_RKMH.shape, q_RKMH.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(R, pl.cdiv(S, size)),
            in_specs=specs,
            out_specs=pl.BlockSpec((1, K, M, H), row),
            scratch_shapes=[pltpu.VMEM((K, M, width), jnp.float32) for width in (1, 1, H)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * R * K * M * S * H,
            bytes_accessed=R * S * slot_bytes,
            transcendentals=R * K * M * S,
        ),
        interpret=platform() != "tpu",
        name="slots_attention",
    )(start_R, token_M1, q_RKMH, *jax.tree.leaves(cache))


def _block_size(S: int, slot_bytes: int) -> int:
    """Returns the slots of a block: all S, or a power of 2 of at least `LANES`."""
    slots = max(LANES, BLOCK_BYTES // slot_bytes)
    return min(S, 1 << slots.bit_length() - 1)


def _kernel(
    start_R, token_ref, q_ref, k_ref, v_ref, *refs, tokens: int, size: int, S: int, is_int8: bool
):
    """Adds one block of slots to the attention of the queries of one row."""
    k_scale_ref, v_scale_ref = refs[:2] if is_int8 else (None, None)
    out_ref, largest_ref, total_ref, sum_ref = refs[-4:]
    block, start = pl.program_id(1), start_R[pl.program_id(0)]

    @pl.when(block == 0)
    def _():
        largest_ref[...] = jnp.full_like(largest_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(block * size < start + tokens)
    def _():
        K, dtype = q_ref.shape[1], q_ref.dtype
        last = start - block * size
        last = last if tokens == 1 else last + token_ref[...]
        for k in range(K):
            values_sH = v_ref[0, k].astype(dtype)
            if S % size:  # the last block ends after the cache: its values there are undefined
                slots_s1 = block * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
                values_sH = jnp.where(slots_s1 < S, values_sH, jnp.zeros_like(values_sH))
            scales = [x if x is None else x[0, k : k + 1] for x in (k_scale_ref, v_scale_ref)]
            softmax = [x.at[k] for x in (largest_ref, total_ref, sum_ref)]
            add_slots(q_ref[0, k], k_ref[0, k].astype(dtype), values_sH, scales, last, softmax)

    @pl.when(block == pl.num_programs(1) - 1)
    def _():
        out_ref[0] = (sum_ref[...] / total_ref[...]).astype(out_ref.dtype)


def add_slots(q_MH, keys_sH, values_sH, scales, last: Any, softmax) -> None:
    """Adds slots to the attention of queries of a key/value head.

    Args:
        q_MH: queries.
        keys_sH: keys of the slots, in the dtype of the queries.
        values_sH: values of the slots, in the same dtype.
        scales: those of keys and of values, [1, s] each; None if there are none.
        last: the last slot that the queries attend to, of all or of each [M, 1].
        softmax: references to the largest score [M, 1] so far, the sum of weights [M, 1], and the
            weighted sum of values [M, H].
    """
    (k_scale_1s, v_scale_1s), (largest_ref, total_ref, sum_ref) = scales, softmax
    attended_Ms = jax.lax.broadcasted_iota(jnp.int32, (len(q_MH), len(keys_sH)), 1) <= last
    scores = jax.lax.dot_general(
        q_MH, keys_sH, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    if k_scale_1s is not None:
        scores *= k_scale_1s
    scores = jnp.where(attended_Ms, scores, -jnp.inf)
    largest = jnp.maximum(largest_ref[...], jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - largest)
    shrink = jnp.exp(largest_ref[...] - largest)
    total_ref[...] = shrink * total_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
    if v_scale_1s is not None:
        weights = jnp.where(attended_Ms, weights * v_scale_1s, 0)
    weighted_sum = jnp.dot(
        weights.astype(values_sH.dtype), values_sH, preferred_element_type=jnp.float32
    )
    sum_ref[...] = shrink * sum_ref[...] + weighted_sum
    largest_ref[...] = largest
