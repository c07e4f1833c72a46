"""Attention of one new token per row over a KV cache in pages: a Pallas kernel for TPU.

As in `attention_decode`, keys and values stream once through the matrix unit. The pages of a row
are anywhere in the pool: each is copied on its own, while the block of pages before is computed.
The first block of a row is copied during the last block of the row before. On other platforms the
kernel is interpreted (slow).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llama_jax.model.attention_decode import BLOCK_BYTES, add_slots
from llama_jax.model.cache import PAGE, LayerCache
from llama_jax.parallel.mesh import platform


def attention(
    q_BKGH: jax.Array, cache: LayerCache, position_B: jax.Array, pages_BP: jax.Array
) -> jax.Array:
    """Returns softmax(q·k) v of this device's rows and heads, [B, K, G, H] in q's dtype.

    For use in `jax.shard_map`. A query attends to the slots 0 … its position. A row without pages
    gets anything finite.
    """
    B, K, G, H = q_BKGH.shape
    pools, P = jax.tree.leaves(cache), pages_BP.shape[1]
    n = min(P, max(1, BLOCK_BYTES // (K * PAGE * H * cache.k_BKSH.dtype.itemsize)))
    cores = 2 if B % 2 == 0 else 1  # of a v4 or v5p chip; one core runs both halves elsewhere
    position_B = jnp.where(pages_BP[:, 0] > 0, position_B, 0)

    def row(core, i, pages, position_B):
        return core * (B // cores) + i, 0, 0, 0

    return pl.pallas_call(
        partial(_kernel, n=n, P=P),
        out_shape=jax.ShapeDtypeStruct(q_BKGH.shape, q_BKGH.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores, B // cores),
            in_specs=[
                pl.BlockSpec((1, K, G, H), row),
                *[pl.BlockSpec(memory_space=pl.ANY)] * len(pools),
            ],
            out_specs=pl.BlockSpec((1, K, G, H), row),
            scratch_shapes=[
                *(pltpu.VMEM((2, n, *pool.shape[1:]), pool.dtype) for pool in pools),
                *(pltpu.VMEM((K, G, width), jnp.float32) for width in (1, 1, H)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * K * G * P * PAGE * H,
            bytes_accessed=B * P * sum(pool.nbytes // len(pool) for pool in pools),
            transcendentals=B * K * G * P * PAGE,
        ),
        interpret=platform() != "tpu",
        name="paged_attention",
    )(pages_BP.reshape(-1), position_B, q_BKGH, *pools)


def _kernel(pages, position_B, q_ref, *refs, n: int, P: int):
    """Computes the attention of one row, `n` pages at a time."""
    *refs, largest_ref, total_ref, sum_ref, semaphores, buffer_ref = refs
    pools, out_ref, buffers = (
        refs[: len(refs) // 2],
        refs[len(refs) // 2],
        refs[len(refs) // 2 + 1 :],
    )
    i, rows = pl.program_id(1), pl.num_programs(1)
    row = pl.program_id(0) * rows + i

    def for_each_copy(act, row, block, buffer) -> None:
        """Calls `act` with each copy of a block of pages, those up to the row's own slot."""

        def copy_page(j, carry):
            page = pages[row * P + block * n + j]
            for pool, target in zip(pools, buffers, strict=True):
                act(
                    pltpu.make_async_copy(
                        pool.at[page], target.at[buffer, j], semaphores.at[buffer]
                    )
                )
            return carry

        n_pages = jnp.minimum(n, position_B[row] // PAGE + 1 - block * n)
        jax.lax.fori_loop(0, n_pages, copy_page, 0)

    start = partial(for_each_copy, lambda copy: copy.start())
    wait = partial(for_each_copy, lambda copy: copy.wait())

    @pl.when(i == 0)
    def _():
        # The end of a block may be of an earlier one, with a weight of 0: it must be finite.
        buffers[1][...] = jnp.zeros_like(buffers[1])
        buffer_ref[0] = 0
        start(row, 0, 0)

    largest_ref[...] = jnp.full_like(largest_ref, -jnp.inf)
    total_ref[...] = jnp.zeros_like(total_ref)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    position, (K, _, H), dtype = position_B[row], q_ref.shape[1:], q_ref.dtype
    n_blocks = position // (n * PAGE) + 1

    def add_block(block, carry):
        buffer = buffer_ref[0]

        @pl.when(block + 1 < n_blocks)
        def _():
            start(row, block + 1, 1 - buffer)

        @pl.when((block + 1 == n_blocks) & (i + 1 < rows))
        def _():
            start(row + 1, 0, 1 - buffer)

        wait(row, block, buffer)
        for k in range(K):
            keys_sH, values_sH = (
                x[buffer, :, k].reshape(n * PAGE, H).astype(dtype) for x in buffers[:2]
            )
            scales = [
                jnp.concatenate([x[buffer, j, k : k + 1] for j in range(n)], axis=1)
                for x in buffers[2:]
            ] or [None, None]
            softmax = [x.at[k] for x in (largest_ref, total_ref, sum_ref)]
            last = position - block * n * PAGE
            add_slots(q_ref[0, k], keys_sH, values_sH, scales, last, softmax)
        buffer_ref[0] = 1 - buffer
        return carry

    jax.lax.fori_loop(0, n_blocks, add_block, 0)
    out_ref[0] = (sum_ref[...] / total_ref[...]).astype(out_ref.dtype)
