"""The kernels over the slots of a KV cache, interpreted, equal attention in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of

from llama_jax.errors import InputError
from llama_jax.model import attention, attention_slots, attention_triton
from llama_jax.model.attention_slots import _block_size
from llama_jax.model.cache import LayerCache

H = 128


def inputs(B, K, G, S, cache_dtype, dtype="float32", T=1):
    """Returns queries, a cache, and positions: the first slots, the last, and some between."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(B, T, K * G, H)) / np.sqrt(H), dtype)
    first = [0, S - T, *rng.integers(0, S - T + 1, B)][:B]
    position_BT = jnp.asarray(first, jnp.int32)[:, None] + jnp.arange(T)
    if cache_dtype == "int8":
        values = (jnp.asarray(rng.integers(-127, 128, (B, K, S, H)), jnp.int8) for _ in "kv")
        scales = (jnp.asarray(rng.uniform(0, 2 / 127, (B, K, S)), jnp.float32) for _ in "kv")
        return q, LayerCache(*values, *scales), position_BT
    values = (jnp.asarray(rng.normal(size=(B, K, S, H)), cache_dtype) for _ in "kv")
    return q, LayerCache(*values), position_BT


KERNELS = ["tpu", "gpu"]  # the platform has a kernel of its own


def attend(monkeypatch, platform, q, cache, position_BT, kernel="auto"):
    with monkeypatch.context() as patch:
        patch.setattr(attention, "platform", lambda: platform)
        work = jax.jit(lambda *operands: attention.cached_attention(*operands, kernel))
        return np.asarray(work(q, cache, position_BT), np.float32)


@pytest.mark.parametrize(
    ("shape", "B", "K", "G", "S", "cache_dtype"),
    [
        ((1, 1, 1), 3, 4, 1, 256, "float32"),  # a query has its own key/value head
        ((1, 1, 1), 3, 2, 4, 256, "float32"),  # four queries share one
        ((1, 1, 1), 3, 2, 4, 256, "int8"),
        ((1, 1, 1), 3, 1, 2, 200, "float32"),  # the last block ends after the cache
        ((1, 1, 1), 3, 1, 2, 200, "int8"),
        ((1, 1, 1), 2, 1, 8, 40, "float32"),  # one block
        ((1, 2, 4), 4, 4, 2, 256, "float32"),  # rows and heads on eight devices
        ((1, 2, 4), 4, 4, 2, 256, "int8"),
    ],
)
def test_values_equal_those_of_plain_jax(monkeypatch, shape, B, K, G, S, cache_dtype):
    monkeypatch.setattr(attention_slots, "BLOCK_BYTES", 1)  # blocks of 128 slots
    with jax.set_mesh(mesh_of(shape)):
        operands = inputs(B, K, G, S, cache_dtype)
        kernels = [attend(monkeypatch, platform, *operands) for platform in KERNELS]
        expected = attend(monkeypatch, "cpu", *operands)
    # A weighted mean of values of standard deviation 1; scores and weights are sums of at most 256
    # float32 terms. Measured 5e-7.
    for kernel in kernels:
        np.testing.assert_allclose(kernel, expected, atol=1e-5)
    assert np.std(expected) > 0.05


@pytest.mark.parametrize(
    ("shape", "B", "T", "K", "G", "S", "cache_dtype"),
    [
        ((1, 1, 1), 2, 32, 2, 4, 256, "float32"),  # the chunk of a short prompt
        ((1, 1, 1), 3, 70, 2, 2, 300, "int8"),  # five blocks of queries, of which one is padded
        ((1, 1, 1), 1, 40, 1, 1, 40, "float32"),  # a complete prompt
        ((1, 2, 4), 4, 32, 4, 2, 256, "int8"),  # rows and heads on eight devices
    ],
)
def test_prefill_gives_the_values_of_plain_jax(monkeypatch, shape, B, T, K, G, S, cache_dtype):
    monkeypatch.setattr(attention_slots, "QUERY_ROWS", 32)
    monkeypatch.setattr(attention_slots, "SLOTS", 128)
    with jax.set_mesh(mesh_of(shape)):
        operands = inputs(B, K, G, S, cache_dtype, T=T)
        kernels = [attend(monkeypatch, platform, *operands) for platform in KERNELS]
        expected = attend(monkeypatch, "cpu", *operands)
    for kernel in kernels:
        np.testing.assert_allclose(kernel, expected, atol=1e-5)  # as of one query per row
    assert np.std(expected) > 0.05


@pytest.mark.parametrize("platform", KERNELS)
def test_bfloat16_differs_by_its_rounding(monkeypatch, platform):
    with jax.set_mesh(mesh_of((1, 1, 1))):
        operands = inputs(2, 2, 4, 256, "bfloat16", "bfloat16")
        kernel = attend(monkeypatch, platform, *operands)
        exact = [jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in operands[:2]]
        expected = attend(monkeypatch, "cpu", *exact, operands[2])
    # Each weight and the result are rounded once to 2^-9 of their size; values are below 5.
    np.testing.assert_allclose(kernel, expected, atol=5 * 2 * 2**-9)


@pytest.mark.parametrize("platform", KERNELS)
def test_a_row_has_the_same_bits_alone_and_in_company(monkeypatch, platform):
    monkeypatch.setattr(attention_slots, "BLOCK_BYTES", 1)
    # The GPU's kernel divides a row by the number of rows, which an engine doesn't change.
    monkeypatch.setattr(attention_triton, "PROGRAMS", 1)
    with jax.set_mesh(mesh_of((1, 1, 1))):
        q, cache, position_B1 = inputs(4, 2, 2, 256, "float32")
        together = attend(monkeypatch, platform, q, cache, position_B1)
        for i in range(4):
            row = slice(i, i + 1)
            own = jax.tree.map(lambda x, row=row: x[row], cache)
            alone = attend(monkeypatch, platform, q[row], own, position_B1[row])
            np.testing.assert_array_equal(together[row], alone)


@pytest.mark.parametrize(
    ("platform", "head_dim", "kernel", "calls"),
    [
        ("tpu", H, "auto", 1),
        ("tpu", H, "xla", 0),
        ("tpu", 64, "auto", 0),  # lanes of a TPU's vector unit
        ("gpu", 64, "auto", 1),
        ("gpu", 96, "auto", 0),  # not a power of 2
        ("gpu", H, "xla", 0),
    ],
)
def test_the_kernel_serves_the_heads_that_it_supports_unless_the_model_names_xla(
    monkeypatch, platform, head_dim, kernel, calls
):
    counted = []
    module = {"tpu": attention_slots, "gpu": attention_triton}[platform]
    kernel_attention = module.attention

    def count(*operands, **options):
        counted.append(operands)
        return kernel_attention(*operands, **options)

    monkeypatch.setattr(module, "attention", count)
    with jax.set_mesh(mesh_of((1, 1, 1))):
        q, cache, position_B1 = inputs(1, 1, 2, 32, "float32")
        q, cache = q[..., :head_dim], jax.tree.map(lambda x: x[..., :head_dim], cache)
        attend(monkeypatch, platform, q, cache, position_B1, kernel)
    assert len(counted) == calls


@pytest.mark.parametrize(
    ("slots", "slot_bytes", "size"),
    [(4096, 1024, 512), (4096, 256, 2048), (100, 256, 100), (4096, 8192, 128), (4097, 768, 512)],
)
def test_a_block_has_half_a_mebibyte_and_at_least_128_slots(slots, slot_bytes, size):
    assert _block_size(slots, slot_bytes) == size


def test_the_kernel_for_gpus_refuses_a_cache_that_pallas_addresses_wrongly():
    def attend_to(slots):
        values = (jax.ShapeDtypeStruct((1, 1, slots, H), jnp.int8) for _ in "kv")
        scales = (jax.ShapeDtypeStruct((1, 1, slots), jnp.float32) for _ in "kv")
        q = jax.ShapeDtypeStruct((1, 1, 1, 1, H), jnp.bfloat16)
        position = jax.ShapeDtypeStruct((1,), jnp.int32)
        jax.eval_shape(attention_triton.attention, q, LayerCache(*values, *scales), position)

    with jax.set_mesh(mesh_of((1, 1, 1))):
        attend_to(2**31 // H)
        with pytest.raises(
            InputError, match=r"take 3.0 GiB on a GPU, and the kernel for GPUs can't"
        ):
            attend_to(3 * 2**30 // H)
