"""Attention of one new token per row over a KV cache in pages: a Pallas kernel for TPU.

As in `attention_slots`, keys and values stream once through the matrix unit. The pages of a row
are anywhere in the pool: each is copied on its own, while the previous block of pages is computed.
The first block of a row is copied while the last block of the previous row is computed.

The kernel also writes the new token into the row's page, in place. So only the kernel accesses the
pool, and XLA leaves it in the layout of the kernel. If XLA wrote the token by a scatter, it would
rearrange all scales of an int8 cache in each step. On other platforms the kernel is interpreted
(slow).
"""

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llama_jax.model.attention_slots import BLOCK_BYTES, add_slots
from llama_jax.model.cache import PAGE, LayerCache, quantize
from llama_jax.parallel.head_copies import (
    copy_number,
    exchange_with_copies,
    gather_from_copies,
)
from llama_jax.parallel.mesh import LANES, platform


def attention(
    q_BKGH: jax.Array,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
    cache: LayerCache,
    position_B: jax.Array,
    pages_BP: jax.Array,
    head_copies: int = 1,
) -> tuple[jax.Array, LayerCache]:
    """Returns softmax(q·k) v of this device's rows and heads, [B, K, G, H] in q's dtype.

    For use in `jax.shard_map`. A query attends to the slots 0 … its position. The result of a row
    without pages is finite and has no meaning.

    If several devices have a copy of the same key/value head, each has a part of each page. It
    computes all queries of the head over its own slots, and the devices add up their results.

    Args:
        q_BKGH: queries.
        k_BKH: keys of the new tokens.
        v_BKH: values of the new tokens.
        cache: the pool.
        position_B: positions of the new tokens, which are also their slots.
        pages_BP: pages of each row; the page of its position belongs to no other row.
        head_copies: devices that have a copy of the same head.

    Returns:
        The attention output, and the pool with the new tokens.
    """
    q_BKGH = gather_from_copies(q_BKGH, head_copies, axis=2)
    B, K, G, H = q_BKGH.shape
    pools, P = jax.tree.leaves(cache), pages_BP.shape[1]
    n = min(P, max(1, BLOCK_BYTES // (K * PAGE * H * cache.k_BKSH.dtype.itemsize)))
    cores = 2 if B % 2 == 0 else 1  # of a v4 or v5p chip; one core runs both halves elsewhere
    position_B = jnp.where(pages_BP[:, 0] > 0, position_B, 0)
    last_B, is_new_B = _own_slots(position_B, head_copies)

    def row(core, i, *scalars):
        return core * (B // cores) + i, 0, 0, 0

    def new_row(core, i, *scalars):
        return row(core, i)[:3]

    in_hbm = [pl.BlockSpec(memory_space=pl.ANY)] * len(pools)
    result, result_spec = q_BKGH, pl.BlockSpec((1, K, G, H), row)
    if head_copies > 1:
        # Sums over a part of the slots: for each device with the same head, those of its queries.
        shape = head_copies, B, K, G // head_copies, H + LANES
        result = jax.ShapeDtypeStruct(shape, jnp.float32)
        result_spec = pl.BlockSpec((head_copies, 1, *shape[2:]), lambda *args: (0, *row(*args)))
    out, *pools = pl.pallas_call(
        partial(_kernel, n=n, P=P),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (result, *pools)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, B // cores),
            in_specs=[
                pl.BlockSpec((1, K, G, H), row),
                *[pl.BlockSpec((1, K, H), new_row)] * 2,
                *in_hbm,
            ],
            out_specs=[result_spec, *in_hbm],
            scratch_shapes=[
                *(pltpu.VMEM((2, n, *pool.shape[1:]), pool.dtype) for pool in pools),
                *(pltpu.VMEM((K, G, width), jnp.float32) for width in (1, 1, H)),
                pltpu.SemaphoreType.DMA((3,)),  # of the two buffers, and of the writes
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * K * G * P * PAGE * H,
            bytes_accessed=B * P * sum(pool.nbytes // len(pool) for pool in pools),
            transcendentals=B * K * G * P * PAGE,
        ),
        input_output_aliases={6 + i: 1 + i for i in range(len(pools))},
        interpret=platform() != "tpu",
        name="paged_attention",
    )(pages_BP.reshape(-1), last_B, is_new_B, q_BKGH, k_BKH, v_BKH, *pools)
    if head_copies > 1:
        out = _add_up(exchange_with_copies(out, head_copies)).astype(q_BKGH.dtype)
    return out, LayerCache(*pools)


def _own_slots(position_B: jax.Array, head_copies: int) -> tuple[jax.Array, jax.Array]:
    """Returns the last slot of each row on this device, and whether it is that of the new token.

    Slots are numbered from 0 on each device; -1: the device has no slot of the row yet.
    """
    if head_copies == 1:
        return position_B, jnp.ones_like(position_B)
    page_B, slot_B = position_B // (head_copies * PAGE), position_B % (head_copies * PAGE)
    slot_B -= copy_number(head_copies) * PAGE
    is_new_B = (slot_B >= 0) & (slot_B < PAGE)
    return page_B * PAGE + jnp.clip(slot_B, -1, PAGE - 1), is_new_B.astype(jnp.int32)


def _add_up(sums: jax.Array) -> jax.Array:
    """Returns the attention output [B, K, G, H], given the sums over each part of the slots.

    Args:
        sums: float32 [parts, B, K, G, H + LANES], see `_write_sums`.
    """
    H = sums.shape[-1] - LANES
    values, largest, total = sums[..., :H], sums[..., H : H + 1], sums[..., H + 1 : H + 2]
    # A loop over the parts: a reduction would be an operation of its own on a TPU.
    most = reduce(jnp.maximum, largest)
    weights = [jnp.exp(x - most) for x in largest]
    out = reduce(jnp.add, (w * x for w, x in zip(weights, values, strict=True)))
    return out / reduce(jnp.add, (w * x for w, x in zip(weights, total, strict=True)))


def _kernel(pages, last_B, is_new_B, q_ref, k_ref, v_ref, *refs, n: int, P: int):
    """Computes the attention of one row, `n` pages at a time."""
    *refs, largest_ref, total_ref, sum_ref, semaphores, buffer_ref = refs
    # The pool as an input, the output, the pool as an output (the same memory), the buffers.
    n_arrays = len(refs) // 3
    out_ref, pools = refs[n_arrays], refs[n_arrays + 1 : 2 * n_arrays + 1]
    buffers = refs[2 * n_arrays + 1 :]
    i, rows = pl.program_id(1), pl.num_programs(1)
    row = pl.program_id(0) * rows + i

    def last_read(row):
        """Returns the last slot whose page is read, also if the device has none of the row."""
        return jnp.maximum(last_B[row], 0)

    position = last_read(row)

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

        n_pages = jnp.minimum(n, last_read(row) // PAGE + 1 - block * n)
        jax.lax.fori_loop(0, n_pages, copy_page, 0)

    def for_each_write(act, buffer) -> None:
        """Calls `act` with the copies that write the new token's tile into its page."""
        page = pages[row * P + position // PAGE]

        @pl.when((is_new_B[row] > 0) & (page > 0))
        def _():
            for pool, source in zip(pools, buffers, strict=True):
                source, target = source.at[buffer, position // PAGE % n], pool.at[page]
                tile = _tile(target, position % PAGE)
                act(pltpu.make_async_copy(source.at[:, tile], target.at[:, tile], semaphores.at[2]))

    start = partial(for_each_copy, lambda copy: copy.start())
    wait = partial(for_each_copy, lambda copy: copy.wait())

    @pl.when(i == 0)
    def _():
        # After a row's last page the buffer still contains values of an earlier block. Their
        # weights are 0, but they must be finite: 0 · NaN is NaN.
        buffers[1][...] = jnp.zeros_like(buffers[1])
        buffer_ref[0] = 0
        start(row, 0, 0)

    # Finite, so that a block without any slot adds 0, not exp(-inf + inf).
    largest_ref[...] = jnp.full_like(largest_ref, jnp.finfo(jnp.float32).min)
    total_ref[...] = jnp.zeros_like(total_ref)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    (K, _, H), dtype = q_ref.shape[1:], q_ref.dtype
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

        @pl.when((block + 1 == n_blocks) & (is_new_B[row] > 0))
        def _():
            for new, target in zip(_encode(k_ref, v_ref, len(buffers)), buffers, strict=True):
                _set_slot(target.at[buffer, position // PAGE % n], new, position % PAGE)
            for_each_write(lambda copy: copy.start(), buffer)

        for k in range(K):
            keys_sH, values_sH = (
                x[buffer, :, k].reshape(n * PAGE, H).astype(dtype) for x in buffers[:2]
            )
            scales = [
                jnp.concatenate([x[buffer, j, k : k + 1] for j in range(n)], axis=1)
                for x in buffers[2:]
            ] or [None, None]
            softmax = [x.at[k] for x in (largest_ref, total_ref, sum_ref)]
            last = last_B[row] - block * n * PAGE
            add_slots(q_ref[0, k], keys_sH, values_sH, scales, last, softmax)
        buffer_ref[0] = 1 - buffer
        return carry

    jax.lax.fori_loop(0, n_blocks, add_block, 0)
    if len(out_ref.shape) == 4:
        out_ref[0] = (sum_ref[...] / total_ref[...]).astype(out_ref.dtype)
    else:
        _write_sums(out_ref, largest_ref, total_ref, sum_ref)
    for_each_write(lambda copy: copy.wait(), 1 - buffer_ref[0])


def _write_sums(out_ref, largest_ref, total_ref, sum_ref) -> None:
    """Writes each device's queries: the weighted sum of values, the largest score, the total."""
    G, H = out_ref.shape[3], sum_ref.shape[-1]
    lane = jax.lax.broadcasted_iota(jnp.int32, (len(sum_ref), G, LANES), 2)
    for i in range(len(out_ref)):
        queries = slice(i * G, (i + 1) * G)
        out_ref[i, 0, :, :, :H] = sum_ref[:, queries]
        softmax = jnp.where(lane == 0, largest_ref[:, queries], total_ref[:, queries])
        out_ref[i, 0, :, :, H:] = softmax


def _encode(k_ref, v_ref, n_arrays: int) -> list[jax.Array]:
    """Returns the contents of a row's new slot in each array of the pool, [K, H] and [K, 1].

    They are float32, in which `_set_slot` selects: it represents bfloat16 and int8 exactly.
    """
    new = [x[0].astype(jnp.float32) for x in (k_ref, v_ref)]
    if n_arrays == 2:
        return new
    values, scales = zip(*map(quantize, new), strict=True)
    return [*values, *scales]


def _tile(page_KS_, slot: jax.Array) -> Any:
    """Returns the slots of the tile of memory with `slot`: the kernel writes complete tiles."""
    if len(page_KS_.shape) == 2:  # slots are lanes
        return pl.ds(0, PAGE)
    size = 32 // page_KS_.dtype.itemsize
    return pl.ds(pl.multiple_of(slot // size * size, size), size)


def _set_slot(page_KS_, new_K_: jax.Array, slot: jax.Array) -> None:
    """Stores one slot in a page of keys, values or scales."""
    tile = _tile(page_KS_, slot)
    old_Ks_ = page_KS_[:, tile].astype(jnp.float32)
    new_K_ = new_K_ if old_Ks_.ndim == 2 else new_K_[:, None]
    is_slot = jax.lax.broadcasted_iota(jnp.int32, old_Ks_.shape, 1) == slot - tile.start
    page_KS_[:, tile] = jnp.where(is_slot, new_K_, old_Ks_).astype(page_KS_.dtype)
