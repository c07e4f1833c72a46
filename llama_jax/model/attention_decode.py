"""Attention of one new token per row over the KV cache: a Pallas kernel for TPU.

Each row's keys and values stream once through the matrix unit, up to the row's own slot: slots that
a row doesn't use yet are not read. The softmax is accumulated block by block (arXiv 2205.14135). On
other platforms the kernel is interpreted (slow).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llama_jax.model.cache import LayerCache
from llama_jax.parallel.mesh import LANES, platform

# Bytes of the keys in a block, and of the values. On v5e, reading both takes 1,900 cycles; the
# kernel's code for a block has 690 instructions, which run meanwhile.
BLOCK_BYTES = 1 << 19


def attention(q_BKGH: jax.Array, cache: LayerCache, position_B: jax.Array) -> jax.Array:
    """Returns softmax(q·k) v of this device's rows and heads, [B, K, G, H] in q's dtype.

    For use in `jax.shard_map`. A query attends to the slots 0 … its position.
    """
    B, K, G, H = q_BKGH.shape
    S, itemsize = cache.k_BKSH.shape[2], cache.k_BKSH.dtype.itemsize
    size = _block_size(S, K * H * itemsize)

    def row(b, block, position_B):
        return b, 0, 0, 0

    def slots(b, block, position_B):
        # Beyond the row's own slot the block stays the same, and is not read again.
        return b, 0, jnp.minimum(block, position_B[b] // size), 0

    def scales(b, block, position_B):
        return slots(b, block, position_B)[:3]

    is_int8 = cache.k_scale_BKS is not None
    specs = [
        pl.BlockSpec((1, K, G, H), row),
        *[pl.BlockSpec((1, K, size, H), slots)] * 2,
        *[pl.BlockSpec((1, K, size), scales)] * (2 if is_int8 else 0),
    ]
    return pl.pallas_call(
        partial(_kernel, size=size, S=S, is_int8=is_int8),
        out_shape=jax.ShapeDtypeStruct(q_BKGH.shape, q_BKGH.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, pl.cdiv(S, size)),
            in_specs=specs,
            out_specs=pl.BlockSpec((1, K, G, H), row),
            scratch_shapes=[pltpu.VMEM((K, G, width), jnp.float32) for width in (1, 1, H)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * K * G * S * H,
            bytes_accessed=sum(x.nbytes for x in jax.tree.leaves(cache)),
            transcendentals=B * K * G * S,
        ),
        interpret=platform() != "tpu",
        name="decode_attention",
    )(position_B, q_BKGH, *jax.tree.leaves(cache))


def _block_size(S: int, slot_bytes: int) -> int:
    """Returns the slots of a block: all S, or a power of 2 of at least `LANES`."""
    slots = max(LANES, BLOCK_BYTES // slot_bytes)
    return min(S, 1 << slots.bit_length() - 1)


def _kernel(position_B, q_ref, k_ref, v_ref, *refs, size: int, S: int, is_int8: bool):
    """Adds one block of slots to the attention of one row."""
    k_scale_ref, v_scale_ref = refs[:2] if is_int8 else (None, None)
    out_ref, largest_ref, total_ref, sum_ref = refs[-4:]
    block, position = pl.program_id(1), position_B[pl.program_id(0)]

    @pl.when(block == 0)
    def _():
        largest_ref[...] = jnp.full_like(largest_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(block * size <= position)
    def _():
        K, dtype = q_ref.shape[1], q_ref.dtype
        for k in range(K):
            values_sH = v_ref[0, k].astype(dtype)
            if S % size:  # the last block ends after the cache: its values there are undefined
                slots_s1 = block * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
                values_sH = jnp.where(slots_s1 < S, values_sH, jnp.zeros_like(values_sH))
            scales = [x if x is None else x[0, k : k + 1] for x in (k_scale_ref, v_scale_ref)]
            softmax = [x.at[k] for x in (largest_ref, total_ref, sum_ref)]
            keys_sH = k_ref[0, k].astype(dtype)
            add_slots(q_ref[0, k], keys_sH, values_sH, scales, position - block * size, softmax)

    @pl.when(block == pl.num_programs(1) - 1)
    def _():
        out_ref[0] = (sum_ref[...] / total_ref[...]).astype(out_ref.dtype)


def add_slots(q_GH, keys_sH, values_sH, scales, position, softmax) -> None:
    """Adds slots to the attention of the queries of a key/value head.

    Args:
        q_GH: queries.
        keys_sH: keys of the slots, in the dtype of the queries.
        values_sH: values of the slots, in the same dtype.
        scales: those of keys and of values, [1, s] each; None if there are none.
        position: the last slot that the queries attend to.
        softmax: references to the largest score [G, 1] so far, the sum of weights [G, 1], and the
            weighted sum of values [G, H].
    """
    (k_scale_1s, v_scale_1s), (largest_ref, total_ref, sum_ref) = scales, softmax
    attended_Gs = jax.lax.broadcasted_iota(jnp.int32, (len(q_GH), len(keys_sH)), 1) <= position
    scores = jax.lax.dot_general(
        q_GH, keys_sH, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    if k_scale_1s is not None:
        scores *= k_scale_1s
    scores = jnp.where(attended_Gs, scores, -jnp.inf)
    largest = jnp.maximum(largest_ref[...], jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - largest)
    shrink = jnp.exp(largest_ref[...] - largest)
    total_ref[...] = shrink * total_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
    if v_scale_1s is not None:
        weights = jnp.where(attended_Gs, weights * v_scale_1s, 0)
    weighted_sum = jnp.dot(
        weights.astype(values_sH.dtype), values_sH, preferred_element_type=jnp.float32
    )
    sum_ref[...] = shrink * sum_ref[...] + weighted_sum
    largest_ref[...] = largest
