"""The KV cache: keys and values of earlier tokens, so that decoding computes only the new ones.

The slots of a row are its own, or come in pages from a pool that all rows share. Pages bound a
batch by its tokens instead of rows × context, and rows with a common prefix share its pages.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.config.model import ModelConfig
from llama_jax.parallel.head_copies import (
    copies_of_head,
    copy_number,
    gather_from_copies,
    with_copies,
)
from llama_jax.parallel.mesh import platform
from llama_jax.parallel.rows import RowNumbers, put_rows, take_rows
from llama_jax.parallel.sharding import activation_spec
from llama_jax.runtime.program_store import stored_jit

# Slots of a page on one device: the scales of an int8 page fill the lanes of a TPU's vector unit.
PAGE = 128


class LayerCache(NamedTuple):
    """The KV cache of one layer; an int8 cache has a float32 scale for each head of each slot.

    On a CPU, uint16 numbers are the bits of bfloat16 (`from_stored`).

    B counts rows, or the pages of the pool; S counts the slots of either.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    k_scale_BKS: jax.Array | None = None
    v_scale_BKS: jax.Array | None = None


class KVCache(NamedTuple):
    """The KV cache of a batch. Donate it to `jax.jit`, so that XLA updates it in place.

    Slot s of a row stores the keys and values of the row's token s. The slots after `used_B` may
    contain anything: a query attends only to the slots up to its own. The layers are separate
    arrays, because XLA:CPU copies a layer that it slices from a stack.

    With pages, slot s of a row is slot s % n of the page `pages_BP[row, s // n]`, which has n
    slots (`page_slots`). Each copy of the model has a pool, whose pages it numbers from 0. Page 0
    belongs to no row: rows that are not active write there. A page that rows share is complete, so
    that no row writes it.

    If several devices have a copy of the same key/value head, each stores a part of each page:
    PAGE consecutive slots. Slots that rows own are on all of these devices.
    """

    layers: tuple[LayerCache, ...]
    used_B: jax.Array  # int32: slots in use in each row [tokens]
    # int32: pages of each row, then 0; None: rows own their slots.
    pages_BP: jax.Array | None = None

    @property
    def slots(self) -> int:
        """Number of slots that each row owns [tokens]."""
        return self.layers[0].k_BKSH.shape[2]


def page_slots(config: ModelConfig) -> int:
    """Returns the slots of a page on the current mesh, all of its parts."""
    return PAGE * copies_of_head(config.n_kv_heads)


def init_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """Returns an empty cache for `batch` rows of at most `slots` tokens each."""
    dims = (batch, *with_copies(config).shape("K"), slots, config.head_dim)

    def empty() -> LayerCache:
        def zeros(dtype: str, shape: tuple[int, ...], letters: str) -> jax.Array:
            return jnp.zeros(shape, dtype, out_sharding=activation_spec(letters))

        if config.cache_dtype != "int8":
            # To write a bfloat16 slot, XLA:CPU converts the complete cache to float32 and back:
            # there the cache contains the bits of the numbers.
            as_bits = platform() == "cpu" and config.dtype == "bfloat16"
            dtype = "uint16" if as_bits else config.dtype
            return LayerCache(zeros(dtype, dims, "BKSH"), zeros(dtype, dims, "BKSH"))
        values = (zeros("int8", dims, "BKSH") for _ in "kv")
        return LayerCache(*values, *(zeros("float32", dims[:3], "BKS") for _ in "kv"))

    used_B = jnp.zeros((batch,), jnp.int32, out_sharding=activation_spec("B"))
    return KVCache(tuple(empty() for _ in range(config.n_layers)), used_B)


def init_paged_cache(config: ModelConfig, batch: int, pages: int, row_pages: int) -> KVCache:
    """Returns an empty cache for `batch` rows that share `pages` pages.

    Args:
        config: the model's config.
        batch: rows.
        pages: of the pools of all copies of the model.
        row_pages: most pages of a row.
    """
    layers, _, _ = init_cache(config, pages, PAGE)

    def zeros(dims: str, *shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.int32, out_sharding=activation_spec(dims))

    return KVCache(layers, zeros("B", batch), zeros("BS", batch, row_pages))


def write_cache(
    cache: LayerCache,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    used_B: jax.Array,
    pages_BP: jax.Array | None = None,
    head_copies: int = 1,
) -> LayerCache:
    """Returns a layer's cache with T more tokens in each row, from slot `used_B` on.

    The row must have T free slots: otherwise XLA clamps the start and overwrites earlier slots.
    With pages and T > 1, `used_B` must be a multiple of min(T, PAGE): a write may not cross the end
    of a page. `head_copies` devices have the same key/value head: pages are split between them.
    """
    k_BKTH, v_BKTH = (
        jax.reshard(x.swapaxes(1, 2), activation_spec("BKSH")) for x in (k_BTKH, v_BTKH)
    )
    if cache.k_scale_BKS is None:
        new = LayerCache(*(_to_stored(x, cache.k_BKSH.dtype) for x in (k_BKTH, v_BKTH)))
    else:
        (k, k_scale), (v, v_scale) = quantize(k_BKTH), quantize(v_BKTH)
        new = LayerCache(k.astype(jnp.int8), v.astype(jnp.int8), k_scale[..., 0], v_scale[..., 0])
    if pages_BP is None:
        return jax.tree.map(lambda x, new: _write_slots(x, new, used_B), cache, new)
    write = partial(_write_pages, used_B=used_B, pages_BP=pages_BP, head_copies=head_copies)
    return jax.tree.map(write, cache, new)


def _to_stored(x: jax.Array, dtype: Any) -> jax.Array:
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), dtype)
    return x.astype(dtype)


def from_stored(x: jax.Array, dtype: Any) -> jax.Array:
    """Returns numbers of a cache in `dtype`, even if the cache contains the bits of bfloat16."""
    if x.dtype == jnp.uint16:
        x = jax.lax.bitcast_convert_type(x, jnp.bfloat16)
    return x.astype(dtype)


def _write_pages(
    pool_BKS_: jax.Array,
    new_BKT_: jax.Array,
    used_B: jax.Array,
    pages_BP: jax.Array,
    head_copies: int,
) -> jax.Array:
    """Writes T slots of each row into its pages; one token by a scatter, as `_write_one_slot`."""

    def own(page: jax.Array, slot: jax.Array) -> jax.Array:
        """Returns the page, or page 0 if another device stores its part with the slot."""
        if head_copies == 1:
            return page
        return jnp.where(slot // PAGE % head_copies == copy_number(head_copies), page, 0)

    def local(
        pool_BKS_: jax.Array, new_BKT_: jax.Array, used_B: jax.Array, pages_BP: jax.Array
    ) -> jax.Array:
        B, K, T = new_BKT_.shape[:3]
        if T == 1:
            slot_B1 = used_B[:, None]
            number_B1 = slot_B1 // PAGE // head_copies
            page_B1 = jnp.take_along_axis(pages_BP, number_B1, axis=1, mode="clip")
            index = own(page_B1, slot_B1), jnp.arange(K), slot_B1 % PAGE
            return pool_BKS_.at[index].set(new_BKT_[:, :, 0], mode="clip")
        for row in range(B):
            for start in range(0, T, PAGE):
                slot, part = used_B[row] + start, new_BKT_[row, None, :, start : start + PAGE]
                page = own(pages_BP[row, slot // PAGE // head_copies], slot)
                index = page, 0, slot % PAGE, *(0 for _ in part.shape[3:])
                pool_BKS_ = jax.lax.dynamic_update_slice(pool_BKS_, part, index)
        return pool_BKS_

    values = activation_spec("BKSH"[: pool_BKS_.ndim])
    specs = values, values, activation_spec("B"), activation_spec("BS")
    operands = (pool_BKS_, new_BKT_, used_B, pages_BP)
    mapped = jax.shard_map(local, in_specs=specs, out_specs=values, check_vma=False)
    return mapped(*(jax.reshard(x, spec) for x, spec in zip(operands, specs, strict=True)))


def gather_pages(cache: LayerCache, pages_BP: jax.Array, head_copies: int = 1) -> LayerCache:
    """Returns a layer's cache with the slots of each row next to each other, copied from pages.

    `head_copies` as in `write_cache`: devices with the same head gather the parts of each page.
    """
    pages_spec = activation_spec("BS")

    def gather(pool_BKS_: jax.Array) -> jax.Array:
        def local(pool_BKS_: jax.Array, pages_BP: jax.Array) -> jax.Array:
            B, K = len(pages_BP), pool_BKS_.shape[1]
            pages_BPKS_ = gather_from_copies(pool_BKS_[pages_BP], head_copies, axis=3)
            return pages_BPKS_.swapaxes(1, 2).reshape(B, K, -1, *pool_BKS_.shape[3:])

        spec = activation_spec("BKSH"[: pool_BKS_.ndim])
        mapped = jax.shard_map(local, in_specs=(spec, pages_spec), out_specs=spec, check_vma=False)
        return mapped(jax.reshard(pool_BKS_, spec), jax.reshard(pages_BP, pages_spec))

    return jax.tree.map(gather, cache)


def _write_slots(slots_BKS_: jax.Array, new_BKT_: jax.Array, used_B: jax.Array) -> jax.Array:
    if platform() == "tpu" and new_BKT_.shape[2] == 1:
        return _write_one_slot(slots_BKS_, new_BKT_, used_B)

    def write_row(slots_KS_: jax.Array, new_KT_: jax.Array, used: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(slots_KS_, new_KT_, used, axis=1)

    # Under JAX 0.12 a batch of one row may have lost its sharding over mesh axes of size 1.
    dims = "BKSH"[: slots_BKS_.ndim]
    slots_BKS_, new_BKT_ = (jax.reshard(x, activation_spec(dims)) for x in (slots_BKS_, new_BKT_))
    return jax.vmap(write_row)(slots_BKS_, new_BKT_, jax.reshard(used_B, activation_spec("B")))


def _write_one_slot(slots_BKS_: jax.Array, new_BK1_: jax.Array, used_B: jax.Array) -> jax.Array:
    """Writes one slot of each row by a scatter with one index for each head of each row.

    The TPU compiler runs it as one operation, in place. From one dynamic_update_slice per row it
    generates a loop over the rows with seven operations in each iteration: 87,000 of the 217,000
    cycles of a layer of 70B at batch 8 for the keys alone, and as many for the values. With one
    index per row it copies an int8 cache into another layout and back.
    """
    dims = "BKSH"[: slots_BKS_.ndim]

    def local(slots_BKS_: jax.Array, new_BK1_: jax.Array, used_B: jax.Array) -> jax.Array:
        B, K = slots_BKS_.shape[:2]
        index = jnp.arange(B)[:, None], jnp.arange(K), used_B[:, None]
        return slots_BKS_.at[index].set(
            new_BK1_[:, :, 0], indices_are_sorted=True, unique_indices=True, mode="clip"
        )

    specs = activation_spec(dims), activation_spec(dims), activation_spec("B")
    operands = (slots_BKS_, new_BK1_, used_B)
    mapped = jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)
    return mapped(*(jax.reshard(x, spec) for x, spec in zip(operands, specs, strict=True)))


def quantize(x___H: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns x as integers of -127 … 127, and the scale of each head [..., 1], both float32.

    The scale is the head's largest magnitude over 127.
    """
    x = x___H.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / 127)
    return jnp.round(x / scale), scale


@stored_jit(static_argnames="slots")
def resize_cache(cache: KVCache, *, slots: int) -> KVCache:
    """Returns the cache with `slots` slots in each row; drops the last ones or adds empty ones."""

    def resize(x_BKS_: jax.Array) -> jax.Array:
        missing = slots - x_BKS_.shape[2]
        if missing <= 0:
            return x_BKS_[:, :, :slots]
        return jnp.pad(x_BKS_, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (x_BKS_.ndim - 3))

    return cache._replace(layers=jax.tree.map(resize, cache.layers))


@stored_jit(donate_argnums=0)
def copy_row(cache: KVCache, source: RowNumbers, target: RowNumbers, used: jax.Array) -> KVCache:
    """Returns the cache with a row copied to another one, which then has `used` tokens.

    Both rows are of the same copy of the model.
    """

    def copy(x_BKS_: jax.Array) -> jax.Array:
        return put_rows(x_BKS_, take_rows(x_BKS_, source), target)

    used_C = jnp.full(target.within_C.shape, used, jnp.int32, out_sharding=activation_spec("B"))
    used_B = put_rows(cache.used_B, used_C, target)
    return KVCache(jax.tree.map(copy, cache.layers), used_B)
