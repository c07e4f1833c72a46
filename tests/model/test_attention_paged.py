"""A cache in pages: writes, and attention by XLA and by the kernel, equal those of slots."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, tiny_model

from llama_jax.model import attention, attention_paged
from llama_jax.model.cache import (
    PAGE,
    LayerCache,
    gather_pages,
    init_cache,
    init_paged_cache,
    write_cache,
)
from llama_jax.model.transformer import forward_cached, output_head
from llama_jax.model.weights import Llama, unstack_layers
from llama_jax.parallel.mesh import shard_array
from llama_jax.parallel.sharding import activation_spec

H = 128


def inputs(B, K, G, P, cache_dtype, pools=1, copies=1):
    """Returns queries, keys and values of new tokens, a pool, positions, and each row's pages.

    Where a row has several pages, two rows share their first one. There are `copies` of each of
    the K key/value heads, each of which has G queries of its own and a part of each page.
    """
    rng = np.random.default_rng(0)
    pool_pages, page = 1 + B * P // pools, copies * PAGE
    S, heads = P * page, K * copies
    q, k, v = (rng.normal(size=(B, 1, n, H)).astype(np.float32) for n in (heads * G, K, K))
    k, v = (np.repeat(x, copies, axis=2) for x in (k, v))
    first = [S - 1, page if P > 1 else 5, 0]
    position_B1 = np.array([*first, *rng.integers(0, S, B)][:B], np.int32)[:, None]
    pages_BP = np.concatenate(
        [1 + rng.permutation(pool_pages - 1).reshape(B // pools, P) for _ in range(pools)]
    )
    if P > 1:
        pages_BP[1, 0] = pages_BP[0, 0]
    pages_BP = np.where(np.arange(P) * page <= position_B1, pages_BP, 0).astype(np.int32)
    shape = pools * pool_pages, heads, PAGE
    if cache_dtype == "int8":
        values = (jnp.asarray(rng.integers(-127, 128, (*shape, H)), jnp.int8) for _ in "kv")
        scales = (jnp.asarray(rng.uniform(0, 2 / 127, shape), jnp.float32) for _ in "kv")
        return q / np.sqrt(H), k, v, LayerCache(*values, *scales), position_B1, pages_BP
    values = (jnp.asarray(rng.normal(size=(*shape, H)), cache_dtype) for _ in "kv")
    return q / np.sqrt(H), k, v, LayerCache(*values), position_B1, pages_BP


def attend(monkeypatch, platform, q, k, v, cache, position_B1, pages_BP, copies=1):
    """Returns the attention output, and the cache with the new tokens."""
    with monkeypatch.context() as patch:
        patch.setattr(attention, "platform", lambda: platform)
        work = jax.jit(
            lambda q, k, v, cache, position_B1, *pages: attention.update_and_attend(
                q, k, v, cache, position_B1[:, 0], position_B1, "auto", *pages, head_copies=copies
            )
        )
        pages = [] if pages_BP is None else [pages_BP]
        return jax.tree.map(np.asarray, work(q, k, v, cache, position_B1, *pages))


@pytest.mark.parametrize(
    ("shape", "B", "K", "G", "P", "cache_dtype"),
    [
        ((1, 1, 1), 3, 2, 1, 5, "float32"),  # a query has its own key/value head
        ((1, 1, 1), 4, 2, 4, 3, "float32"),  # two halves of the rows, for chips of two cores
        ((1, 1, 1), 3, 2, 4, 5, "int8"),
        ((1, 1, 1), 2, 1, 8, 1, "float32"),  # one page
        ((1, 2, 4), 4, 4, 2, 3, "float32"),  # two pools, and heads on four devices
        ((1, 2, 4), 4, 4, 2, 3, "int8"),
        ((1, 1, 4), 6, 2, 2, 3, "float32"),  # two devices with the same head
        ((1, 2, 4), 4, 1, 2, 2, "int8"),  # four devices with the same head
    ],
)
def test_pages_give_the_values_of_slots(monkeypatch, shape, B, K, G, P, cache_dtype):
    copies = max(1, shape[2] // K)
    page_bytes = max(1, K // shape[2]) * PAGE * H * jnp.dtype(cache_dtype).itemsize
    monkeypatch.setattr(attention_paged, "BLOCK_BYTES", 2 * page_bytes)  # two pages a block
    with jax.set_mesh(mesh_of(shape)):
        *new, pool, position_B1, pages_BP = inputs(B, K, G, P, cache_dtype, shape[1], copies)
        slots = jax.jit(gather_pages, static_argnums=2)(pool, pages_BP, copies)
        expected, _ = attend(monkeypatch, "cpu", *new, slots, position_B1, None)
        copied, after = attend(monkeypatch, "cpu", *new, pool, position_B1, pages_BP, copies)
        found = [
            attend(monkeypatch, platform, *new, pool, position_B1, pages_BP, copies)
            for platform in ("tpu", "gpu")
        ]
    np.testing.assert_array_equal(copied, expected)
    # Only XLA writes to page 0, what another device stores.
    is_owned = np.arange(len(pool.k_BKSH)) % (len(pool.k_BKSH) // shape[1]) > 0
    for kernel, written in found:
        jax.tree.map(
            lambda x, y: np.testing.assert_array_equal(x[is_owned], y[is_owned]), written, after
        )
        # As in test_attention_slots.py: sums of at most 640 float32 terms, of size 1.
        np.testing.assert_allclose(kernel, expected, atol=1e-5)
    assert np.std(expected) > 0.05


def test_a_row_has_the_same_bits_alone_and_in_company_and_in_other_pages(monkeypatch):
    monkeypatch.setattr(attention_paged, "BLOCK_BYTES", 1 << 19)
    with jax.set_mesh(mesh_of((1, 1, 1))):
        *new, pool, position_B1, pages_BP = inputs(4, 2, 2, 4, "float32")
        together, _ = attend(monkeypatch, "tpu", *new, pool, position_B1, pages_BP)
        order = np.random.default_rng(1).permutation(len(pool.k_BKSH) - 1) + 1
        moved = jax.tree.map(lambda x: x.at[order].set(x[1:]), pool)
        for i in (0, 3):
            row = slice(i, i + 1)
            own = np.where(pages_BP[row] > 0, order[pages_BP[row] - 1], 0)
            alone = *(x[row] for x in new), moved, position_B1[row], own
            found, _ = attend(monkeypatch, "tpu", *alone)
            np.testing.assert_array_equal(together[row], found)


def test_a_row_without_pages_reads_one_writes_none_and_gives_finite_numbers(monkeypatch):
    with jax.set_mesh(mesh_of((1, 1, 1))):
        q, k, v, pool, position_B1, pages_BP = inputs(2, 1, 2, 2, "float32")
        position_B1[1], pages_BP[1] = 10**6, 0
        found, written = attend(monkeypatch, "tpu", q, k, v, pool, position_B1, pages_BP)
    np.testing.assert_allclose(found[1, 0, 0], v[1, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(written.k_BKSH[0], pool.k_BKSH[0])


@pytest.mark.parametrize("cache_dtype", ["same", "int8"])
@pytest.mark.parametrize("used", [0, 2 * PAGE])
@pytest.mark.parametrize("T", [1, 32, PAGE, 2 * PAGE])
def test_pages_receive_the_slots_that_rows_would(cache_dtype, used, T):
    config = tiny_model(n_layers=1, cache_dtype=cache_dtype)
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(2, T, 4, 8)), jnp.float32) for _ in "kv")
    pages_BP = jnp.array([[3, 1, 2, 4], [1, 2, 3, 4]])  # of two pools
    used_B = jnp.array([used + (5 if T == 1 else 0), used])
    with jax.set_mesh(mesh_of((1, 2, 4))):
        pool = jax.tree.map(lambda x: x + 3, init_paged_cache(config, 2, 10, 4).layers[0])

        def write(pool, k, v, used_B, pages_BP):
            used_B = jax.reshard(used_B, activation_spec("B"))
            slots = write_cache(gather_pages(pool, pages_BP), k, v, used_B)
            paged = write_cache(pool, k, v, used_B, pages_BP)
            return slots, gather_pages(paged, pages_BP), paged

        expected, found, paged = jax.jit(write)(pool, k, v, used_B, pages_BP)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    scratch = np.asarray(paged.k_BKSH).reshape(2, 5, 4, PAGE, 8)[:, 0]
    np.testing.assert_array_equal(scratch, np.full_like(scratch, 3))


@pytest.mark.parametrize(
    ("shape", "cache_dtype", "platform"),
    [
        ((1, 1, 1), "same", "tpu"),
        ((1, 1, 2), "same", "tpu"),
        ((1, 2, 2), "int8", "tpu"),
        ((1, 2, 4), "same", "tpu"),
        ((1, 1, 8), "int8", "tpu"),  # two devices with the same key/value head
        ((1, 1, 1), "same", "gpu"),
        ((1, 2, 2), "int8", "gpu"),
        ((1, 1, 8), "same", "gpu"),
    ],
)
def test_logits_over_pages_equal_those_over_slots(monkeypatch, shape, cache_dtype, platform):
    """A prompt fills a page that both rows share; then the kernel decodes and writes."""
    config = tiny_model(n_layers=1, n_kv_heads=4, head_dim=H, cache_dtype=cache_dtype)
    rng, copies = np.random.default_rng(0), max(1, shape[2] // 4)
    page = copies * PAGE
    pieces = [rng.integers(0, config.vocab_size, (2, n)) for n in (page, 1, 1, 1)]
    # Both rows have the same first page; on two pools each has its own copy of it.
    pieces[0][1] = pieces[0][0]
    pages_BP = np.array([[2, 1], [2, 3]], np.int32)

    def logits(model, cache, tokens_BT):
        x_BTD, cache = forward_cached(config, model, cache, tokens_BT)
        return output_head(config, model, x_BTD), cache

    with jax.set_mesh(mesh_of(shape)):
        all_heads = replace(config, n_kv_heads=4 * copies)
        model = jax.jit(Llama, static_argnums=0)(all_heads, jax.random.key(0))
        for matrix in (model.layers.wk, model.layers.wv):
            heads = np.asarray(matrix[...])[:, :, ::copies]
            copied = np.repeat(heads, copies, axis=2)
            matrix[...] = jax.device_put(copied, matrix[...].sharding)
        model = unstack_layers(model)
        slots = jax.jit(init_cache, static_argnums=(0, 1, 2))(config, 2, 2 * page)
        paged = jax.jit(init_paged_cache, static_argnums=(0, 1, 2, 3))(config, 2, 8, 2)
        paged = paged._replace(pages_BP=shard_array(pages_BP, "BS"))
        step, step_with_kernel = (jax.jit(partial(logits, model)) for _ in "12")
        for tokens_BT in pieces:
            expected, slots = step(slots, tokens_BT)
            with monkeypatch.context() as patch:
                patch.setattr(attention, "platform", lambda: platform)
                found, paged = step_with_kernel(paged, tokens_BT)
            np.testing.assert_allclose(found, expected, atol=1e-5)
        assert np.std(expected) > 0.1
