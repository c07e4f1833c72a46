from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of

from llama_jax.errors import InputError
from llama_jax.model import attention as attention_module
from llama_jax.model import attention_xla
from llama_jax.model.attention import attention, cached_attention
from llama_jax.model.cache import LayerCache, quantize
from llama_jax.parallel.collectives import to_balanced_order


def reference(q, k, v, segments):
    """Attention in float64, one query at a time."""
    B, T, N, _ = q.shape
    G = N // k.shape[2]
    out = np.zeros(q.shape)
    for b in range(B):
        for t in range(T):
            keys = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
            for n in range(N):
                scores = k[b, keys, n // G] @ q[b, t, n]
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights @ v[b, keys, n // G] / weights.sum()
    return out


def random(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_segments(B, T):
    return np.sort(np.random.default_rng(3).integers(1, 4, (B, T)), axis=1).astype(np.int32)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("K", [1, 2, 6])
@pytest.mark.parametrize(("kernel", "T"), [("xla", 13), ("xla", 100), ("splash", 256)])
def test_attention_equals_a_float64_reference(K, kernel, T):
    B, N, H = 2, 6, 8
    q, k, v = random((B, T, N, H), 0), random((B, T, K, H), 1), random((B, T, K, H), 2)
    q /= np.sqrt(H)
    segments = random_segments(B, T)
    out = jax.jit(attention, static_argnums=4)(q, k, v, segments, kernel)
    # Sums of at most 256 products of float32 numbers of size 1: 256 · 6e-8.
    np.testing.assert_allclose(
        out, reference(*(np.float64(x) for x in (q, k, v)), segments), atol=6e-8 * max(100, T)
    )


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(("kernel", "T", "end"), [("xla", 12, 5), ("splash", 256, 100)])
def test_nothing_crosses_a_segment_in_values_or_gradients(kernel, T, end):
    """A kernel that fails this test must not be used with packed documents."""
    q, k, v = (random((1, T, 2, 4), i) for i in range(3))
    segments = jnp.asarray([[1] * end + [2] * (T - end)])

    def second_document(q, k, v):
        return jnp.sum(attention(q, k, v, segments, kernel)[:, end:] ** 2)

    value_and_grads = jax.jit(jax.value_and_grad(second_document, argnums=(0, 1, 2)))
    value, grads = value_and_grads(q, k, v)
    for grad in grads:
        assert np.all(np.asarray(grad)[:, :end] == 0)
        assert np.all(np.abs(np.asarray(grad)[:, end + 1 :]).sum((0, 2, 3)) > 0)
    for x in (q, k, v):
        x[:, :end] = 1e3
    assert value_and_grads(q, k, v)[0] == value


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(("kernel", "T"), [("xla", 9), ("splash", 128)])
def test_a_query_does_not_attend_to_later_keys(kernel, T):
    q, k, v = (random((1, T, 2, 4), i) for i in range(3))

    def early_queries(q, k, v):
        return jnp.sum(attention(q, k, v, None, kernel)[:, :4] ** 2)

    for grad in jax.jit(jax.grad(early_queries, argnums=(1, 2)))(q, k, v):
        assert np.all(np.asarray(grad)[:, 4:] == 0)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 1, 4), (2, 1, 2, 2)])
@pytest.mark.parametrize("kernel", ["xla", "splash"])
def test_every_kernel_agrees_on_every_mesh(kernel, shape, packed):
    """Values and gradients, packed or not, with the sequence sharded or not."""
    B, T, N, K, H = 2, 1024, 4, 2, 8
    q, k, v = random((B, T, N, H), 0), random((B, T, K, H), 1), random((B, T, K, H), 2)
    q /= np.sqrt(H)
    segments = random_segments(B, T) if packed else None

    def loss(kernel, q, k, v, segments, weights):
        out = attention(q, k, v, segments, kernel)
        return jnp.sum(out * jax.reshard(weights, jax.typeof(out).sharding.spec)), out

    gradient = jax.jit(jax.grad(loss, argnums=(1, 2, 3), has_aux=True), static_argnums=0)
    weights = random(q.shape, 4)
    with jax.set_mesh(mesh_of((1, 1, 1))):
        expected = gradient("xla", q, k, v, segments, weights)
    with jax.set_mesh(mesh_of(shape)):
        order = to_balanced_order(np.arange(T))
        operands = [x if x is None else x[:, order] for x in (q, k, v, segments, weights)]
        results = gradient(kernel, *operands)
    for result, reference in zip(*map(jax.tree.leaves, (results, expected)), strict=True):
        # Sums of at most 1024 float32 products of size 1: 1024 · 6e-8.
        np.testing.assert_allclose(result, np.asarray(reference)[:, order], atol=6e-5)


@pytest.mark.usefixtures("one_device")
def test_cached_attention_equals_attention_at_the_queries_positions():
    q, k, v = (random((2, 10, 4, 8), i) for i in range(3))
    full = jax.jit(attention)(q, k, v, np.ones((2, 10), np.int32))
    cache = LayerCache(k.swapaxes(1, 2), v.swapaxes(1, 2))
    positions = np.array([[6, 7], [1, 2]], np.int32)
    queries = np.stack([q[0, 6:8], q[1, 1:3]])
    cached = jax.jit(cached_attention)(queries, cache, positions)
    np.testing.assert_allclose(cached, np.stack([full[0, 6:8], full[1, 1:3]]), atol=1e-6)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("slots", [40, 256, 300])  # less than a block, two, two that overlap
def test_blocks_of_a_cache_give_the_result_of_all_slots_and_rows_their_own_bits(slots, int8):
    B, K, G, T, H = 3, 2, 3, 2, 16
    positions = np.array([[3, 4], [slots - 2, slots - 1], [slots // 2, slots // 2 + 1]], np.int32)
    q = random((B, K, G, T, H), 0) / np.sqrt(H)
    k, v = random((B, K, slots, H), 1), random((B, K, slots, H), 2)
    cache = LayerCache(k, v)
    if int8:
        (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
        cache = LayerCache(k.astype(np.int8), v.astype(np.int8), k_scale[..., 0], v_scale[..., 0])
    in_blocks = jax.jit(attention_xla.attend_cached_blocks)
    found = in_blocks(q, cache, positions)
    expected = jax.jit(attention_xla.attend_cached)(q, cache, positions)
    # Sums of at most 300 float32 products of size 1, of which the scores' errors are exponents.
    np.testing.assert_allclose(found, expected, atol=2e-6)
    for row in range(B):
        others_idle = np.where(np.arange(B)[:, None] == row, positions, 0)
        np.testing.assert_array_equal(in_blocks(q, cache, others_idle)[row], found[row])


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("kernel", "T", "sentence"),
    [
        (
            "splash",
            100,
            "splash needs a multiple of 128 positions, but the sequence has 100; use auto",
        ),
        ("cudnn", 128, "cudnn needs an NVIDIA GPU, but the platform is cpu; use auto or xla"),
    ],
)
def test_an_unsupported_kernel_is_rejected_with_the_reason(kernel, T, sentence):
    q = jnp.zeros((1, T, 2, 8))
    with pytest.raises(InputError, match=sentence):
        jax.jit(partial(attention, kernel=kernel))(q, q, q, None)


@pytest.mark.parametrize(
    ("platform", "packed", "kernel"),
    [("tpu", True, "splash"), ("gpu", False, "cudnn"), ("gpu", True, "xla"), ("cpu", True, "xla")],
)
def test_auto_selects_the_kernel_of_the_platform(monkeypatch, platform, packed, kernel):
    monkeypatch.setattr(attention_module, "platform", lambda: platform)
    monkeypatch.setattr(attention_module, "context_shards", lambda: 1)
    q = jnp.zeros((1, 128, 2, 64), jnp.bfloat16)
    segments = jnp.ones((1, 128), jnp.int32) if packed else None
    assert attention_module._choose_kernel("auto", q, segments) == kernel
