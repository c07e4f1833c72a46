"""Attention by JAX's splash kernel (Pallas) for TPU; interpreted, and slow, on other platforms."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from llama_jax.parallel.collectives import local_sequence_shard, to_balanced_order
from llama_jax.parallel.mesh import context_shards, platform

LANES = 128  # of a TPU's vector unit: blocks of keys are multiples of it


def unsupported_reason(q_BTNH: jax.Array, parts: int) -> str | None:
    """Tells why the kernel can't take these queries, split into `parts` of a sequence; or None."""
    T = q_BTNH.shape[1]
    if T % (LANES * 2 * parts) and (parts > 1 or T % LANES):
        of_them = f" in each of {2 * parts} chunks" if parts > 1 else ""
        return f"needs a multiple of {LANES} positions{of_them}, and has {T} in all"
    return None


def _block_sizes(T: int, S: int) -> splash.BlockSizes:
    """Returns the tiles for T queries and S keys.

    Large ones keep the matrix unit busy; on the other hand 1024 × 1024 float32 scores are 4 MiB of
    the 16 MiB of fast memory that a v5e kernel may take.
    """
    queries = max(size for size in (128, 256, 512, 1024) if T % size == 0)
    keys = max(size for size in (128, 256, 512, 1024) if S % size == 0)
    # The fused backward pass makes two products fewer, but writes dq once for each block of keys.
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
    """Returns the kernel of N heads, this device's T queries and S keys."""
    parts = context_shards()
    causal = splash.CausalMask((S, S), shard_count=parts)
    causal.q_sequence = to_balanced_order(causal.q_sequence)
    made = splash.make_splash_mha(
        splash.MultiHeadMask([causal] * N),
        head_shards=1,
        q_seq_shards=parts,
        block_sizes=_block_sizes(T, S),
        residual_checkpoint_name="attention",
        interpret=platform() != "tpu",
    )
    if parts == 1:
        return made

    def mine(blocks: Any) -> Any:
        """Keeps which blocks of keys this device's queries see."""
        if blocks is None:
            return None
        by_query = {"data_next": 1, "mask_next": 1, "block_mask": 1, "q_sequence": 0}
        return blocks._replace(
            **{
                name: local_sequence_shard(getattr(blocks, name), axis)
                for name, axis in by_query.items()
                if getattr(blocks, name) is not None
            }
        )

    infos, settings = made.tree_flatten()
    return type(made)(*map(mine, infos), **settings)


def attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS) -> jax.Array:
    """Returns what this device's queries see of whole texts, [B, T, N, H].

    For use in `jax.shard_map`; keys are in the order of the text, queries in that of the mesh.
    """
    _, T, N, _ = q_BTNH.shape
    kernel = _kernel(N, T, k_BSKH.shape[1])
    segments = None
    if segments_BT is not None:
        segments = splash.SegmentIds(segments_BT, segments_BS)
    q_BNTH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments)
    return out_BNTH.swapaxes(1, 2)
