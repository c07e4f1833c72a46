"""Attention of new tokens over a KV cache: a Pallas kernel for NVIDIA GPUs, compiled by Triton.

A program computes a block of queries of one key/value head. It reads the slots up to the last that
these attend to, in the row's pages or its own slots, and accumulates the softmax block by block
(arXiv 2205.14135): no page is copied, and no scores are materialized. Few rows would give a decode
step fewer programs than a GPU runs at once, so several programs share the slots of a row, and their
results are added up; so do devices that have the same head and a part of each page. On other
platforms the kernel is interpreted (slow).

JAX 0.12 announces that a later version will have no Triton, but only its own Mosaic, which is for
Hopper and later. Then attention is XLA's until the kernel is rewritten.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llama_jax.errors import InputError
from llama_jax.model.cache import LayerCache
from llama_jax.parallel.head_copies import (
    copy_number,
    exchange_with_copies,
    gather_from_copies,
)
from llama_jax.parallel.mesh import platform

# Bytes of a block of queries, of keys, and of values. Two blocks of keys and of values are in
# shared memory at once: 80 KiB with the queries, where the smallest GPU since Ampere has 99.
BLOCK_BYTES = 1 << 14
# Programs of a step, if it has few rows: two for each of the 132 multiprocessors of an H100.
PROGRAMS = 264
MOST_PARTS = 64


def supports(H: int) -> bool:
    """Returns whether the kernel computes heads of size H on the GPUs of the current mesh.

    Blocks of Triton have powers of 2. Since JAX 0.11, Pallas compiles only for GPUs that it knows
    by name: many of data centers, few others.
    """
    if H < 16 or H & (H - 1):
        return False
    get_gpu_info = getattr(plgpu, "get_gpu_info", None)
    if platform() == "gpu" and get_gpu_info:
        try:
            get_gpu_info()
        except ValueError:
            return False
    return True


def attention(
    q_BTKGH: jax.Array,
    cache: LayerCache,
    position_B: jax.Array,
    pages_BP: jax.Array | None = None,
    head_copies: int = 1,
) -> jax.Array:
    """Returns softmax(q·k) v of this device's rows and heads, [B, T, K, G, H] in q's dtype.

    For use in `jax.shard_map`. Query t of a row attends to the slots 0 … position + t.

    Args:
        q_BTKGH: queries of heads that it `supports`.
        cache: slots of each row, or the pool of pages.
        position_B: position of each row's first token.
        pages_BP: pages of each row; None: rows own their slots.
        head_copies: devices that have a copy of the same head, and each a part of each page.

    Raises:
        InputError: Pallas would address the cache by numbers of 32 bits that are too small.
    """
    # Pallas uses 64 bits for arrays over 4 GiB; Triton takes those of 32 bits as signed.
    keys = cache.k_BKSH
    if keys.size > 1 << 31 and keys.nbytes <= 1 << 32:
        raise InputError(
            f"the int8 keys of a layer in the KV cache take {keys.nbytes / 2**30:.1f} GiB on a GPU,"
            " and the kernel for GPUs can't address 2 to 4 GiB: ask for a smaller cache, or set"
            " model.attention to xla"
        )
    q_BTKGH = gather_from_copies(q_BTKGH, head_copies, axis=3)
    B, T, K, G, H = q_BTKGH.shape
    own = copy_number(head_copies) if head_copies > 1 else 0
    own_1 = jnp.full(1, own, jnp.int32)
    if pages_BP is None:
        pages_BP = jnp.arange(B, dtype=jnp.int32)[:, None]
    M, block = T * G, _block_rows(H, q_BTKGH.dtype)
    m = min(block, max(16, pl.next_power_of_2(M)))
    blocks = pl.cdiv(M, m)
    # Not by the number of slots: a row has the same bits in a larger cache.
    parts = min(MOST_PARTS, pl.cdiv(PROGRAMS, B * K * blocks))
    q_BKMH = q_BTKGH.transpose(0, 2, 1, 3, 4).reshape(B, K, M, H)
    q_BKMH = jnp.pad(q_BKMH, [(0, 0), (0, 0), (0, blocks * m - M), (0, 0)])

    def queries(b, k, part):
        return b // blocks, k, b % blocks, 0

    def results(b, k, part):
        return part, *queries(b, k, part)

    def complete(x):
        return pl.BlockSpec(x.shape, lambda b, k, part: (0,) * x.ndim)

    shape = parts, *q_BKMH.shape
    arrays = jax.tree.leaves(cache)
    out, log_total = pl.pallas_call(
        partial(
            _kernel, T=T, G=G, blocks=blocks, parts=parts, slots=block, head_copies=head_copies
        ),
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32 if parts * head_copies > 1 else q_BKMH.dtype),
            jax.ShapeDtypeStruct(shape[:-1], jnp.float32),
        ],
        grid=(B * blocks, K, parts),
        in_specs=[
            *map(complete, (own_1, position_B, pages_BP)),
            pl.BlockSpec((None, None, m, H), queries),
            *map(complete, arrays),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, m, H), results),
            pl.BlockSpec((None, None, None, m), lambda *program: results(*program)[:-1]),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=platform() != "gpu",
        name="cache_attention",
    )(own_1, position_B, pages_BP, q_BKMH, *arrays)
    out_BKMH, log_total_BKM = _add_up(out, log_total)
    out_BKTGH = out_BKMH[:, :, :M].reshape(B, K, T, G, H)
    if head_copies > 1:
        log_total_BKTG1 = log_total_BKM[:, :, :M].reshape(B, K, T, G, 1)
        sums = jnp.concatenate([out_BKTGH, log_total_BKTG1], axis=-1)
        queries_of_each = jnp.stack(jnp.split(sums, head_copies, axis=3))
        sums = exchange_with_copies(queries_of_each, head_copies)
        out_BKTGH, _ = _add_up(sums[..., :H], sums[..., H])
    return out_BKTGH.transpose(0, 2, 1, 3, 4).astype(q_BTKGH.dtype)


def _add_up(out: jax.Array, log_total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns attention over all slots, and the log of the softmax's sum, from those of each part.

    Args:
        out: [parts, …, H], float32 if there are several.
        log_total: [parts, …]; -inf: the part has no attended slot.
    """
    if len(out) == 1:
        return out[0], log_total[0]
    # As in the kernel: finite, also if no part has an attended slot; then the total is 0.
    largest = jnp.maximum(jnp.max(log_total, axis=0), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(log_total - largest)
    total = jnp.sum(weights, axis=0)
    sums = jnp.sum(out * weights[..., None], axis=0)
    return sums / jnp.maximum(total, 1.0)[..., None], largest + jnp.log(total)


def _block_rows(H: int, dtype: jnp.dtype) -> int:
    """Returns the queries or slots of a block: 64 heads of 128 in bfloat16."""
    return min(64, max(16, BLOCK_BYTES // (H * dtype.itemsize)))  # 16: of a product in Triton


def _kernel(
    own_ref, position_ref, pages_ref, q_ref, k_ref, v_ref, *refs,
    T: int, G: int, blocks: int, parts: int, slots: int, head_copies: int,
):  # fmt: skip
    """Computes a block of queries over every `parts`-th block of slots."""
    *scale_refs, out_ref, log_total_ref = refs
    (m, H), dtype, S = q_ref.shape, q_ref.dtype, k_ref.shape[2]
    row, k, part = pl.program_id(0) // blocks, pl.program_id(1), pl.program_id(2)
    # A page has a multiple of `size` slots. The last block of a row's own slots may end after them:
    # there it reads the last slot again.
    size = min(slots, pl.next_power_of_2(S))
    per_page = pl.cdiv(S, size)

    def position(query):
        return position_ref[row] + jnp.minimum(query // G, T - 1)

    first_query = pl.program_id(0) % blocks * m
    last, last_m = position(first_query + m - 1), position(first_query + jnp.arange(m))
    q_mH = q_ref[...]
    dot = partial(
        jax.lax.dot_general,
        # Not in TF32.
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

    def add_block(i, softmax):
        largest_m, total_m, sum_mH = softmax
        block = part + i * parts
        page, first = pages_ref[row, block // per_page], block % per_page * size
        slot_s = first + jnp.arange(size)
        index = page, k, slot_s if S % size == 0 else jnp.minimum(slot_s, S - 1)
        keys_sH, values_sH = (x[index].astype(dtype) for x in (k_ref, v_ref))
        scores_ms = dot(q_mH, keys_sH, (((1,), (1,)), ((), ())))
        if scale_refs:
            scores_ms *= scale_refs[0][index][None]
        number = block // per_page * head_copies + own_ref[0]  # of the page's part in the text
        attended_ms = (number * S + slot_s)[None] <= last_m[:, None]
        attended_ms &= (slot_s < S)[None]
        scores_ms = jnp.where(attended_ms, scores_ms, -jnp.inf)
        new_m = jnp.maximum(largest_m, jnp.max(scores_ms, axis=1))
        weights_ms, shrink_m = jnp.exp(scores_ms - new_m[:, None]), jnp.exp(largest_m - new_m)
        total_m = shrink_m * total_m + jnp.sum(weights_ms, axis=1)
        if scale_refs:
            weights_ms *= scale_refs[1][index][None]
        new_mH = dot(weights_ms.astype(dtype), values_sH, (((1,), (0,)), ((), ())))
        return new_m, total_m, shrink_m[:, None] * sum_mH + new_mH

    # Finite, so that a block without an attended slot adds 0, not exp(-inf + inf).
    largest_m = jnp.full((m,), jnp.finfo(jnp.float32).min)
    softmax = largest_m, jnp.zeros((m,)), jnp.zeros((m, H))
    if head_copies == 1:
        n_blocks = last // S * per_page + last % S // size + 1
    else:  # the own part of the last page may have no attended slot
        n_blocks = (last // (S * head_copies) + 1) * per_page
    own = jnp.maximum(n_blocks - part + parts - 1, 0) // parts
    largest_m, total_m, sum_mH = jax.lax.fori_loop(0, own, add_block, softmax)
    # The largest score has the weight 1: the total is at least 1, or 0 without an attended slot.
    out_ref[...] = (sum_mH / jnp.maximum(total_m, 1.0)[:, None]).astype(out_ref.dtype)
    log_total_ref[...] = largest_m + jnp.log(total_m)
