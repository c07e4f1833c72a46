"""Attention with JAX's splash kernel (Pallas) for TPU; interpreted (slow) on other platforms."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from llama_jax.parallel.collectives import local_sequence_shard, to_balanced_order
from llama_jax.parallel.mesh import LANES, context_shards, platform


def unsupported_reason(q_BTNH: jax.Array, shards: int) -> str | None:
    """Returns why the kernel can't process a sequence of this length on `shards`, or None.

    Its blocks of keys must be multiples of LANES.
    """
    T = q_BTNH.shape[1]
    if T % (LANES * 2 * shards) and (shards > 1 or T % LANES):
        in_chunks = f" in each of {2 * shards} chunks" if shards > 1 else ""
        return f"needs a multiple of {LANES} positions{in_chunks}, but the sequence has {T}"
    return None


def _block_sizes(T: int, S: int) -> splash.BlockSizes:
    """Returns the tile sizes for T queries and S keys.

    Large tiles use the matrix unit well, but 1024 × 1024 float32 scores already take 4 MiB of the
    16 MiB of VMEM that a kernel may use on v5e.
    """
    queries = max(size for size in (128, 256, 512, 1024) if T % size == 0)
    keys = max(size for size in (128, 256, 512, 1024) if S % size == 0)
    # The fused backward pass saves two matrix products, but writes dq once for each block of keys.
    fused = S // keys <= 2
    return splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=min(keys, 512),
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=min(keys, 512),
        block_q_dq=None if fused else queries,
        block_kv_dq=None if fused else keys,
        use_fused_bwd_kernel=fused,
    )


def _kernel(N: int, T: int, S: int) -> Callable[..., Any]:
    """Returns the kernel for N heads, this device's T queries and S keys."""
    shards = context_shards()
    causal = splash.CausalMask((S, S), shard_count=shards)
    causal.q_sequence = to_balanced_order(causal.q_sequence)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([causal] * N),
        head_shards=1,
        q_seq_shards=shards,
        block_sizes=_block_sizes(T, S),
        residual_checkpoint_name="attention",
        interpret=platform() != "tpu",
    )
    if shards == 1:
        return kernel

    def local_mask(mask_info: Any) -> Any:
        """Returns the block mask of this device's queries."""
        if mask_info is None:
            return None
        query_axes = {"data_next": 1, "mask_next": 1, "block_mask": 1, "q_sequence": 0}
        return mask_info._replace(
            **{
                name: local_sequence_shard(getattr(mask_info, name), axis)
                for name, axis in query_axes.items()
                if getattr(mask_info, name) is not None
            }
        )

    mask_infos, settings = kernel.tree_flatten()
    return type(kernel)(*map(local_mask, mask_infos), **settings)


def attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS) -> jax.Array:
    """Returns the attention output of this device's queries, [B, T, N, H].

    For use in `jax.shard_map`. Keys are in text order, queries in the mesh's balanced order.
    """
    _, T, N, _ = q_BTNH.shape
    kernel = _kernel(N, T, k_BSKH.shape[1])
    segments = None
    if segments_BT is not None:
        segments = splash.SegmentIds(segments_BT, segments_BS)
    q_BNTH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments)
    return out_BNTH.swapaxes(1, 2)
