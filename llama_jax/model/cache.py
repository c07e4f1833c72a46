"""The keys and values of texts that are being continued."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.config.model import ModelConfig
from llama_jax.parallel.mesh import platform
from llama_jax.parallel.sharding import activation_spec


class LayerCache(NamedTuple):
    """Keys and values of one layer, in the cache's type; int8 comes with a scale for each."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    k_scale_BKS: jax.Array | None = None
    v_scale_BKS: jax.Array | None = None


class KVCache(NamedTuple):
    """Keys and values of a batch, written in place (donate it).

    Slot s of a row holds those of the row's token number s. What stands beyond `used_B` is never
    seen: a query sees the slots up to its own. Layers stand one by one, because XLA's CPU back end
    copies a layer that it takes out of a stack.
    """

    layers: tuple[LayerCache, ...]
    used_B: jax.Array  # int32: tokens of each row that the model has read

    @property
    def slots(self) -> int:
        """Slots of each row."""
        return self.layers[0].k_BKSH.shape[2]


def init_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """Returns an empty cache for `batch` rows of at most `slots` tokens each."""
    dims = (batch, config.n_kv_heads, slots, config.head_dim)

    def empty() -> LayerCache:
        def zeros(dtype: str, shape: tuple[int, ...], letters: str) -> jax.Array:
            return jnp.zeros(shape, dtype, out_sharding=activation_spec(letters))

        if config.cache_dtype != "int8":
            dtype = config.dtype
            return LayerCache(zeros(dtype, dims, "BKSH"), zeros(dtype, dims, "BKSH"))
        numbers = (zeros("int8", dims, "BKSH") for _ in "kv")
        return LayerCache(*numbers, *(zeros("float32", dims[:3], "BKS") for _ in "kv"))

    used_B = jnp.zeros((batch,), jnp.int32, out_sharding=activation_spec("B"))
    return KVCache(tuple(empty() for _ in range(config.n_layers)), used_B)


def write_cache(
    kept: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, used_B: jax.Array
) -> LayerCache:
    """Returns a layer's cache with T more tokens in each row, from slot `used_B` on.

    The slots must be there: XLA would write over earlier ones.
    """
    k_BKTH, v_BKTH = (
        jax.reshard(x.swapaxes(1, 2), activation_spec("BKSH")) for x in (k_BTKH, v_BTKH)
    )
    if kept.k_scale_BKS is None or kept.v_scale_BKS is None:
        k, v = k_BKTH.astype(kept.k_BKSH.dtype), v_BKTH.astype(kept.v_BKSH.dtype)
        return LayerCache(
            _write_slots(kept.k_BKSH, k, used_B), _write_slots(kept.v_BKSH, v, used_B)
        )
    (k, k_scale), (v, v_scale) = _quantize(k_BKTH), _quantize(v_BKTH)
    return LayerCache(
        _write_slots(kept.k_BKSH, k, used_B),
        _write_slots(kept.v_BKSH, v, used_B),
        _write_slots(kept.k_scale_BKS, k_scale, used_B),
        _write_slots(kept.v_scale_BKS, v_scale, used_B),
    )


def _write_slots(slots_BKS_: jax.Array, new_BKT_: jax.Array, used_B: jax.Array) -> jax.Array:
    if platform() == "cpu" and slots_BKS_.dtype == jnp.bfloat16 and new_BKT_.shape[2] == 1:
        # In bfloat16 XLA's CPU back end writes rows apart by making all of the cache float32 and
        # back: choosing for each slot is faster (8 rows of SmolLM2-135M: a step 58 to 41 ms).
        here_BS = jnp.arange(slots_BKS_.shape[2]) == used_B[:, None]
        return jnp.where(here_BS[:, None, :, None], new_BKT_, slots_BKS_)

    def row(slots_KS_: jax.Array, new_KT_: jax.Array, used: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(slots_KS_, new_KT_, used, axis=1)

    # Under JAX 0.12 a batch of one row may have lost how it is split, over axes of one device.
    dims = "BKSH"[: slots_BKS_.ndim]
    slots_BKS_, new_BKT_ = (jax.reshard(x, activation_spec(dims)) for x in (slots_BKS_, new_BKT_))
    return jax.vmap(row)(slots_BKS_, new_BKT_, jax.reshard(used_B, activation_spec("B")))


def _quantize(x_BKTH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns each head of each token as int8, and the scale that its largest number sets."""
    x = x_BKTH.astype(jnp.float32)
    largest_BKT = jnp.max(jnp.abs(x), axis=-1)
    scale_BKT = jnp.where(largest_BKT == 0, 1.0, largest_BKT / 127)
    return jnp.round(x / scale_BKT[..., None]).astype(jnp.int8), scale_BKT


@partial(jax.jit, static_argnames="slots")
def resize_cache(cache: KVCache, *, slots: int) -> KVCache:
    """Returns the cache with more or fewer slots; what fewer don't hold is lost."""

    def change(x_BKS_: jax.Array) -> jax.Array:
        missing = slots - x_BKS_.shape[2]
        if missing <= 0:
            return x_BKS_[:, :, :slots]
        return jnp.pad(x_BKS_, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (x_BKS_.ndim - 3))

    return cache._replace(layers=jax.tree.map(change, cache.layers))


@partial(jax.jit, donate_argnums=0)
def copy_row(cache: KVCache, source: jax.Array, target: jax.Array, used: jax.Array) -> KVCache:
    """Returns the cache with row `source` in row `target` too, which holds `used` tokens of it."""

    def copied(x_BKS_: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(x_BKS_, source, 1, axis=0)
        return jax.lax.dynamic_update_slice_in_dim(x_BKS_, row, target, axis=0)

    used_B = jnp.where(jnp.arange(len(cache.used_B)) == target, used, cache.used_B)
    return KVCache(jax.tree.map(copied, cache.layers), used_B)
