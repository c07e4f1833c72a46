"""Causal grouped-query attention within segments; selects the platform's kernel."""

from functools import partial

import jax
import jax.numpy as jnp

from llama_jax.errors import InputError
from llama_jax.model import attention_xla
from llama_jax.model.cache import LayerCache, gather_pages, write_cache
from llama_jax.model.remat import save_for_backward
from llama_jax.parallel.collectives import gather_sequence
from llama_jax.parallel.mesh import LANES, context_shards, platform
from llama_jax.parallel.sharding import activation_spec

# The modules of Pallas kernels are imported where they are used: Pallas takes 0.15 s.
PLATFORM_KERNELS = {"tpu": "splash", "gpu": "cudnn"}


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None,
    kernel: str = "auto",
    ends_BT: jax.Array | None = None,
) -> jax.Array:
    """Returns softmax(q·k) v over complete texts, [B, T, N, H] in q's dtype.

    A position attends to itself and to earlier positions of its segment (None: each row is one
    segment). The caller divides q by √H. Scores and softmax are float32. Each of the K key/value
    heads serves N/K consecutive query heads, as in `repeat_kv` of Meta's code, without being
    copied. On a mesh that splits sequences, T is in balanced order (`collectives.shard_sequence`).

    Args:
        kernel: 'xla' (everywhere), 'splash' (TPU; interpreted elsewhere), 'cudnn' (NVIDIA), or
            'auto': the platform's kernel if it supports these shapes and dtypes and has passed the
            test that segments stay separate, else 'xla'.
        ends_BT: of rows that are prefix trees in depth-first order, the index after the last token
            of each token's subtree: token i attends to token j if j ≤ i < ends[j]. Such rows always
            use 'xla': the other kernels don't have this mask.

    Raises:
        InputError: the named kernel does not support these shapes, dtypes or this platform.
    """
    kernel = "xla" if ends_BT is not None else _choose_kernel(kernel, q_BTNH, segments_BT)

    def local(q_BTNH, k_BTKH, v_BTKH, segments_BT, ends_BT):
        k_BSKH, v_BSKH = gather_sequence(k_BTKH), gather_sequence(v_BTKH)
        segments_BS = None if segments_BT is None else gather_sequence(segments_BT)
        ends_BS = None if ends_BT is None else gather_sequence(ends_BT)
        if kernel == "cudnn":
            return _cudnn(q_BTNH, k_BSKH, v_BSKH, segments_BT)
        if kernel == "splash":
            from llama_jax.model import attention_splash

            return attention_splash.attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS)
        return attention_xla.attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, ends_BS)

    specs = (
        activation_spec("BTNH"),
        activation_spec("BTKH"),
        activation_spec("BTKH"),
        activation_spec("BT"),
        activation_spec("BT"),
    )
    operands = (q_BTNH, k_BTKH, v_BTKH, segments_BT, ends_BT)
    sharded = (x if x is None else jax.reshard(x, s) for x, s in zip(operands, specs, strict=True))
    # check_vma=True would require every kernel to declare the mesh axes its results vary over.
    mapped = jax.shard_map(
        local, in_specs=specs, out_specs=activation_spec("BTNH"), check_vma=False
    )
    return mapped(*sharded)


def _choose_kernel(kernel: str, q_BTNH: jax.Array, segments_BT: jax.Array | None) -> str:
    candidate = PLATFORM_KERNELS.get(platform(), "xla") if kernel == "auto" else kernel
    if kernel == "auto" and candidate == "cudnn" and segments_BT is not None:
        # cuDNN has not passed the test of segments (benchmarks/gpu_train_step.py --gate) on a GPU.
        return "xla"
    reason = None
    if candidate == "splash":
        from llama_jax.model import attention_splash

        reason = attention_splash.unsupported_reason(q_BTNH, context_shards())
    elif candidate == "cudnn":
        reason = _cudnn_unsupported_reason(q_BTNH)
    if reason is None:
        return candidate
    if kernel == "auto":
        return "xla"
    raise InputError(f"model.attention {kernel} {reason}; use auto or xla")


def _cudnn_unsupported_reason(q_BTNH: jax.Array) -> str | None:
    H = q_BTNH.shape[-1]
    if platform() != "gpu":
        return f"needs an NVIDIA GPU, but the platform is {platform()}"
    if q_BTNH.dtype == jnp.float32:
        return "supports only bfloat16, but model.dtype is float32"
    if H % 8 or H > 128:
        return f"needs a head size of 8, 16 … 128, but model.head_dim is {H}"
    if context_shards() > 1:
        return f"can't split a sequence over mesh.context ({context_shards()})"
    return None


def _cudnn(q_BTNH, k_BSKH, v_BSKH, segments_BT):
    """Calls cuDNN's flash attention; segments become a mask, which it reads block by block."""
    mask_B1TS = None
    if segments_BT is not None:
        mask_B1TS = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, is_causal=True, scale=1.0, implementation="cudnn"
    )
    return save_for_backward("attention", out_BTNH)


def has_cache_kernel(kernel: str, H: int) -> bool:
    """Returns whether a Pallas kernel computes attention over a KV cache: on TPUs and GPUs.

    Args:
        kernel: as in `attention`.
        H: the head size.
    """
    if kernel == "xla" or context_shards() > 1:
        return False
    if platform() == "gpu":
        try:
            from llama_jax.model import attention_triton
        except ImportError:  # JAX 0.12 announces that a later version has no Triton
            return False
        return attention_triton.supports(H)
    return platform() == "tpu" and H % LANES == 0


def cached_attention(
    q_BTNH: jax.Array,
    cache: LayerCache,
    positions_BT: jax.Array,
    kernel: str = "auto",
    pages_BP: jax.Array | None = None,
    head_copies: int = 1,
) -> jax.Array:
    """Returns softmax(q·k) v over a layer's KV cache, [B, T, N, H] in q's dtype.

    A query attends to the slots 0 … its position, the last of which has its own key and value. The
    caller divides q by √H.

    Args:
        kernel: as in `attention`. Unless 'xla' is named or the kernel doesn't support the shape,
            this is `attention_slots` on a TPU and `attention_triton` on a GPU; else it is 'xla'.
            `attention_triton` reads the rows' pages in place, and so does 'xla' on a CPU if they
            are not split; the others copy them first.
        pages_BP: pages of each row, as in `KVCache`; None: rows own their slots.
        head_copies: devices with the same key/value head, between which pages are split.
    """
    q_BTNH = jax.reshard(q_BTNH, activation_spec("BTNH"))
    cache = jax.tree.map(jax.reshard, cache, _cache_specs(cache))
    B, T, N, H = q_BTNH.shape
    K = cache.k_BKSH.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H, out_sharding=activation_spec("BTKGH"))
    has_kernel = has_cache_kernel(kernel, H)
    reads_pages = head_copies == 1 if platform() == "cpu" else has_kernel and platform() == "gpu"
    if pages_BP is not None and not reads_pages:
        cache, pages_BP = gather_pages(cache, pages_BP, head_copies), None
    if has_kernel:
        return _kernel_attention(q_BTKGH, cache, positions_BT, pages_BP, head_copies)
    if T == 1 and N == K and platform() == "tpu":
        # XLA computes a product with one query on the vector unit, with eight on the matrix unit.
        q_BTKGH = jnp.concatenate([q_BTKGH] * 8, axis=3)
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    if platform() == "cpu":
        out_BKGTH = _attend_blocks(q_BKGTH, cache, positions_BT, pages_BP)
    else:
        out_BKGTH = attention_xla.attend_cached(q_BKGTH, cache, positions_BT)
    out_BTKGH = out_BKGTH.transpose(0, 3, 1, 2, 4)[:, :, :, : N // K]
    return out_BTKGH.reshape(B, T, N, H, out_sharding=activation_spec("BTNH"))


def update_and_attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    cache: LayerCache,
    used_B: jax.Array,
    positions_BT: jax.Array,
    kernel: str = "auto",
    pages_BP: jax.Array | None = None,
    head_copies: int = 1,
) -> tuple[jax.Array, LayerCache]:
    """Returns `cached_attention` and the cache after `write_cache` of the tokens' keys and values.

    On a TPU, `attention_paged` does both for one token per row of pages, unless `kernel` is 'xla'
    or the kernel doesn't support the shape.

    Args:
        q_BTNH, k_BTKH, v_BTKH, cache, kernel, pages_BP, head_copies: as in `cached_attention`.
        used_B: slot of each row's first token, where it is written.
        positions_BT: slots of the tokens, to which their queries attend; 0 in rows that are not
            active, so that their caches are not read.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[-1]
    in_place = platform() == "tpu" and has_cache_kernel(kernel, H)
    if pages_BP is None or T > 1 or not in_place:
        cache = write_cache(cache, k_BTKH, v_BTKH, used_B, pages_BP, head_copies)
        return cached_attention(q_BTNH, cache, positions_BT, kernel, pages_BP, head_copies), cache

    from llama_jax.model import attention_paged

    def local(q_B1NH, k_B1KH, v_B1KH, cache, positions_B1, pages_BP):
        q_BKGH = q_B1NH.reshape(len(q_B1NH), cache.k_BKSH.shape[1], -1, q_B1NH.shape[-1])
        out_BKGH, cache = attention_paged.attention(
            q_BKGH, k_B1KH[:, 0], v_B1KH[:, 0], cache, positions_B1[:, 0], pages_BP, head_copies
        )
        return out_BKGH.reshape(q_B1NH.shape), cache

    operands = q_BTNH, k_BTKH, v_BTKH, cache, positions_BT, pages_BP
    letters, cache_specs = ("BTNH", "BTKH", "BTKH"), _cache_specs(cache)
    specs = *map(activation_spec, letters), cache_specs, *map(activation_spec, ("BT", "BS"))
    mapped = jax.shard_map(
        local, in_specs=specs, out_specs=(specs[0], cache_specs), check_vma=False
    )
    return mapped(*jax.tree.map(jax.reshard, operands, specs))


def _attend_blocks(
    q_BKGTH: jax.Array, cache: LayerCache, positions_BT: jax.Array, pages_BP: jax.Array | None
) -> jax.Array:
    """Returns `attend_cached`; each device reads as many blocks as its own rows need."""
    pages = () if pages_BP is None else (pages_BP,)
    operands = q_BKGTH, cache, positions_BT, *pages
    specs = activation_spec("BKGTH"), _cache_specs(cache), activation_spec("BT")
    specs += tuple(activation_spec("BS") for _ in pages)
    mapped = jax.shard_map(
        attention_xla.attend_cached_blocks, in_specs=specs, out_specs=specs[0], check_vma=False
    )
    return mapped(*jax.tree.map(jax.reshard, operands, specs))


def _kernel_attention(
    q_BTKGH: jax.Array,
    cache: LayerCache,
    positions_BT: jax.Array,
    pages_BP: jax.Array | None,
    head_copies: int,
) -> jax.Array:
    """Returns the attention output [B, T, N, H] of tokens at consecutive positions."""
    if platform() == "gpu":
        from llama_jax.model import attention_triton

        copies = 1 if pages_BP is None else head_copies  # rows' own slots are on all devices
        kernel = partial(attention_triton.attention, head_copies=copies)
    else:
        from llama_jax.model import attention_slots

        kernel = attention_slots.attention

    def local(q_BTKGH, cache, positions_BT, *pages) -> jax.Array:
        out_BTKGH = kernel(q_BTKGH, cache, positions_BT[:, 0], *pages)
        return out_BTKGH.reshape(*q_BTKGH.shape[:2], -1, q_BTKGH.shape[-1])

    pages = () if pages_BP is None else (pages_BP,)
    operands = q_BTKGH, cache, positions_BT, *pages
    specs = activation_spec("BTKGH"), _cache_specs(cache), activation_spec("BT")
    specs += tuple(activation_spec("BS") for _ in pages)
    mapped = jax.shard_map(
        local, in_specs=specs, out_specs=activation_spec("BTNH"), check_vma=False
    )
    return mapped(*jax.tree.map(jax.reshard, operands, specs))


def _cache_specs(cache: LayerCache) -> LayerCache:
    """Returns the sharding of each array of a layer's cache."""
    return jax.tree.map(lambda x: activation_spec("BKSH"[: x.ndim]), cache)
