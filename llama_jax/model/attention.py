"""Causal grouped-query attention that never crosses a segment, by the kernel of the platform."""

import jax
import jax.numpy as jnp

from llama_jax.errors import InputError
from llama_jax.model import attention_splash, attention_xla
from llama_jax.model.cache import LayerCache
from llama_jax.model.remat import save_for_backward
from llama_jax.parallel.collectives import gather_sequence
from llama_jax.parallel.mesh import context_shards, platform
from llama_jax.parallel.sharding import activation_spec

PLATFORM_KERNELS = {"tpu": "splash", "gpu": "cudnn"}


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None,
    kernel: str = "auto",
) -> jax.Array:
    """Returns softmax(q·k) v over the visible keys of whole texts, [B, T, N, H] in q's dtype.

    A position sees those up to its own whose segment is its own (None: all one text). q comes
    divided by √H. Scores and softmax are float32. Each of the K key/value heads serves N/K query
    heads in turn, as in `repeat_kv` of the reference, without being repeated. Over a mesh that
    splits sequences, T is in balanced order (`collectives.shard_sequence`).

    Args:
        kernel: 'xla' (everywhere), 'splash' (TPU; interpreted elsewhere), 'cudnn' (NVIDIA), or
            'auto': the one of the platform that is compiled for, where it can do what is asked
            and is known to keep segments apart.

    Raises:
        InputError: the kernel that was named can't do what is asked.
    """
    kernel = _choose_kernel(kernel, q_BTNH, segments_BT)

    def local(q_BTNH, k_BTKH, v_BTKH, segments_BT):
        k_BSKH, v_BSKH = gather_sequence(k_BTKH), gather_sequence(v_BTKH)
        segments_BS = None if segments_BT is None else gather_sequence(segments_BT)
        if kernel == "cudnn":
            return _cudnn(q_BTNH, k_BSKH, v_BSKH, segments_BT)
        module = attention_splash if kernel == "splash" else attention_xla
        return module.attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS)

    specs = (
        activation_spec("BTNH"),
        activation_spec("BTKH"),
        activation_spec("BTKH"),
        activation_spec("BT"),
    )
    operands = (q_BTNH, k_BTKH, v_BTKH, segments_BT)
    placed = (x if x is None else jax.reshard(x, s) for x, s in zip(operands, specs, strict=True))
    # check_vma would want every kernel to tell which axes its results differ along.
    mapped = jax.shard_map(
        local, in_specs=specs, out_specs=activation_spec("BTNH"), check_vma=False
    )
    return mapped(*placed)


def _choose_kernel(kernel: str, q_BTNH: jax.Array, segments_BT: jax.Array | None) -> str:
    wanted = PLATFORM_KERNELS.get(platform(), "xla") if kernel == "auto" else kernel
    if kernel == "auto" and wanted == "cudnn" and segments_BT is not None:
        # cuDNN's has not passed the gate (benchmarks/gpu_train_step.py --gate) on a GPU yet.
        return "xla"
    problem = None
    if wanted == "splash":
        problem = attention_splash.unsupported_reason(q_BTNH, context_shards())
    elif wanted == "cudnn":
        problem = _cudnn_problem(q_BTNH)
    if problem is None:
        return wanted
    if kernel == "auto":
        return "xla"
    raise InputError(f"model.attention {kernel} {problem}; take auto or xla")


def _cudnn_problem(q_BTNH: jax.Array) -> str | None:
    H = q_BTNH.shape[-1]
    if platform() != "gpu":
        return f"needs an NVIDIA GPU, and this is a {platform()}"
    if q_BTNH.dtype == jnp.float32:
        return "computes in bfloat16 alone, and model.dtype is float32"
    if H % 8 or H > 128:
        return f"needs heads of 8, 16 … 128, and model.head_dim is {H}"
    if context_shards() > 1:
        return f"can't split a sequence over context ({context_shards()})"
    return None


def _cudnn(q_BTNH, k_BSKH, v_BSKH, segments_BT):
    """Calls cuDNN's flash attention; segments are a mask, read block by block."""
    mask_B1TS = None
    if segments_BT is not None:
        mask_B1TS = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, is_causal=True, scale=1.0, implementation="cudnn"
    )
    return save_for_backward("attention", out_BTNH)


def cached_attention(q_BTNH: jax.Array, kept: LayerCache, positions_BT: jax.Array) -> jax.Array:
    """Returns what `attention` does, for queries whose keys and values are in a cache.

    They see the slots up to their own, which are their positions.
    """
    q_BTNH = jax.reshard(q_BTNH, activation_spec("BTNH"))
    kept = jax.tree.map(lambda x: jax.reshard(x, activation_spec("BKSH"[: x.ndim])), kept)
    B, T, N, H = q_BTNH.shape
    K = kept.k_BKSH.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H, out_sharding=activation_spec("BTKGH"))
    alone = T == 1 and N == K and platform() == "tpu"
    if alone:  # XLA gives a single query to the vector unit, and eight of them to the matrix unit
        q_BTKGH = jnp.concatenate([q_BTKGH] * 8, axis=3)
    out_BKGTH = attention_xla.attend_cached(q_BTKGH.transpose(0, 2, 3, 1, 4), kept, positions_BT)
    out_BTKGH = out_BKGTH.transpose(0, 3, 1, 2, 4)[:, :, :, : N // K]
    return out_BTKGH.reshape(B, T, N, H, out_sharding=activation_spec("BTNH"))
