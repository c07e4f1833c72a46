"""The branches for TPU, forced on the CPU with interpreted kernels, equal the branches for CPU.

Tested elsewhere: splash attention on every mesh (test_attention.py), reduce-scatters in two steps
and meshes of several slices (test_sharding.py), int8 products without blocks (test_quantize.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, tiny_model
from flax import nnx

from llama_jax.model import (
    attention,
    attention_splash,
    cache,
    linear,
    linear_cpu,
    linear_transposed,
    remat,
    rope,
)
from llama_jax.model.cache import LayerCache, init_cache, write_cache
from llama_jax.model.quantize import MATRIX_DIMS, Int8Matrix
from llama_jax.model.transformer import forward, forward_cached, output_head
from llama_jax.model.weights import Llama, quantize_model, restore_layout, unstack_layers
from llama_jax.parallel.sharding import activation_spec

BFLOAT16 = 2.0**-8  # largest relative rounding error


def run_on_both(monkeypatch, work):
    """Returns the pairs of the leaves of `work()` with the branches for TPU, and for CPU."""
    results = []
    for platform in ("tpu", "cpu"):
        for module in (attention, cache, linear, linear_cpu, linear_transposed, rope):
            monkeypatch.setattr(module, "platform", lambda platform=platform: platform)
        results.append(jax.tree.map(lambda x: np.asarray(x, np.float32), work()))
    return zip(*map(jax.tree.leaves, results), strict=True)


def random(shape, seed, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def test_loss_and_gradients_of_a_training_step(monkeypatch):
    """`auto` selects splash; gradients of w1 and w3 as [F, D]; products in the requested dtype."""
    config = tiny_model(remat="products", context=128)
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, 129))
    segments_BT = np.sort(np.random.default_rng(1).integers(1, 4, (2, 128)))
    calls = []
    splash = attention_splash.attention

    def recorded(*args):
        calls.append(len(args))
        return splash(*args)

    monkeypatch.setattr(attention_splash, "attention", recorded)

    def work():
        def loss(model, tokens_BT, targets_BT):
            logits = forward(config, model, tokens_BT, None, segments_BT)
            is_target = jnp.arange(config.vocab_size) == targets_BT[..., None]
            return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.sum(logits * is_target, -1))

        return jax.jit(jax.value_and_grad(loss))(model, tokens_BT[:, :-1], tokens_BT[:, 1:])

    with jax.set_mesh(mesh_of((1, 2, 2))):
        model = jax.jit(Llama, static_argnums=0)(config, jax.random.key(0))
        for tpu, cpu in run_on_both(monkeypatch, work):
            # Sums of at most 256 float32 terms whose magnitudes add up to about 1.
            np.testing.assert_allclose(tpu, cpu, atol=256 * 2**-24)
    assert len(calls) > 0


@pytest.mark.usefixtures("one_device")
def test_the_unfused_backward_pass_of_splash():
    """For more than two blocks of keys; here three blocks of 128."""
    B, T, H = 1, 384, 8
    sizes = attention_splash._block_sizes(T, T)
    assert not sizes.use_fused_bwd_kernel
    segments_BT = np.sort(np.random.default_rng(1).integers(1, 4, (B, T)))
    q, k, v, weights = (random((B, T, 2, H), i) / np.sqrt(np.sqrt(H)) for i in range(4))

    def gradient(kernel):
        def loss(q, k, v):
            return jnp.sum(weights * attention.attention(q, k, v, segments_BT, kernel))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for splash, xla in zip(gradient("splash"), gradient("xla"), strict=True):
        np.testing.assert_allclose(splash, xla, atol=T * 2**-24)


@pytest.mark.usefixtures("one_device")
def test_offloading_the_layers_inputs_does_not_change_the_gradients(monkeypatch):
    monkeypatch.setattr(remat, "platform", lambda: "tpu")
    tokens_BT = np.random.default_rng(0).integers(0, 320, (2, 16))
    model = jax.jit(Llama, static_argnums=0)(tiny_model(n_layers=1), jax.random.key(0))

    def gradients(config):
        return jax.jit(jax.grad(lambda m: jnp.mean(forward(config, m, tokens_BT) ** 2)))(model)

    results = (gradients(tiny_model(n_layers=1, remat=remat)) for remat in ("offload", "full"))
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize(
    ("shape", "dtype", "quantized"),
    [
        ((1, 1, 1), "float32", "none"),
        ((1, 1, 1), "bfloat16", "none"),
        ((1, 2, 4), "float32", "int8"),
    ],
)
def test_decoding_text_token_by_token(monkeypatch, shape, dtype, quantized):
    """A row is duplicated, a query repeated 8 times, RoPE a matrix product, one slot a scatter.

    Only wq, wk and wv are transposed; the scale of an int8 matrix comes before the sum over chips.
    """
    config = tiny_model(n_kv_heads=8, dtype=dtype, param_dtype=dtype)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (6, shape[1], 1))

    def work():
        model = jax.jit(Llama, static_argnums=0)(config, jax.random.key(0))
        used, model = quantize_model(config, model) if quantized == "int8" else (config, model)
        model = unstack_layers(model)

        def step(cache, token_BT):
            x_BTD, cache = forward_cached(used, model, cache, token_BT)
            return cache, output_head(used, model, x_BTD)

        empty = init_cache(used, tokens.shape[1], 8)
        decode = jax.jit(lambda tokens: jax.lax.scan(step, empty, tokens)[1])
        return decode(tokens)

    # float32: sums of at most 64 terms, three consecutive ones in each layer. bfloat16: about ten
    # roundings on the path through two layers, of numbers as large as the logits.
    with jax.set_mesh(mesh_of(shape)):
        for tpu, cpu in run_on_both(monkeypatch, work):
            size = np.max(np.abs(cpu))
            tolerance = size * (10 * BFLOAT16 if dtype == "bfloat16" else 6 * 64 * 2**-24)
            np.testing.assert_allclose(tpu, cpu, atol=tolerance)
            assert size > 1


@pytest.mark.parametrize("quantized", ["none", "int8"])
@pytest.mark.usefixtures("one_device")
def test_only_matrices_with_two_output_axes_are_transposed_and_restored(monkeypatch, quantized):
    config = tiny_model()

    def init():
        model = jax.jit(Llama, static_argnums=0)(config, jax.random.key(0))
        return quantize_model(config, model)[1] if quantized == "int8" else model

    monkeypatch.setattr(linear_transposed, "platform", lambda: "tpu")
    expected, model = init(), unstack_layers(init())
    layer = model.layers[1]
    shapes = {name: layer_values(layer, name).shape for name in MATRIX_DIMS}
    assert shapes == {
        "wq": (8, 8, 32), "wk": (4, 8, 32), "wv": (4, 8, 32), "wo": (8, 8, 32),
        "w1": (32, 64), "w3": (32, 64), "w2": (64, 32),
    }  # fmt: skip
    for i, restored in enumerate(restore_layout(model).layers):
        like = jax.tree.map(lambda w_L, i=i: w_L[i], expected.layers)
        assert jax.tree.structure(restored) == jax.tree.structure(like)
        jax.tree.map(np.testing.assert_array_equal, restored, like)


def layer_values(layer, name):
    matrix = getattr(layer, name)
    return matrix.values if isinstance(matrix, Int8Matrix) else matrix


@pytest.mark.parametrize("cache_dtype", ["same", "int8"])
def test_one_new_slot_of_each_row_is_written_bit_for_bit(monkeypatch, cache_dtype):
    config = tiny_model(n_layers=1, cache_dtype=cache_dtype)
    k, v = (random((4, 1, 4, 8), i) for i in range(2))
    used = jnp.array([0, 5, 15, 16])  # the last row is full: its last slot is overwritten

    def work():
        def write(cache, k, v):
            return write_cache(cache, k, v, jax.reshard(used, activation_spec("B")))

        full = jax.tree.map(lambda x: x + 3, init_cache(config, 4, 16).layers[0])
        return jax.jit(write)(full, k, v)

    with jax.set_mesh(mesh_of((2, 1, 4))):
        for tpu, cpu in run_on_both(monkeypatch, work):
            np.testing.assert_array_equal(tpu, cpu)
            assert np.sum(tpu != 3) > 0


@pytest.mark.usefixtures("one_device")
def test_the_product_of_a_duplicated_row_has_one_row(monkeypatch):
    config = tiny_model(dtype="bfloat16")
    x, w = random((1, 1, 32), 0, "bfloat16"), nnx.Param(random((32, 64), 1, "bfloat16"))
    work = jax.jit(lambda: linear.matmul(config, "BTD,DF->BTF", x, w))
    exact = np.float32(x[0]) @ np.float32(w[...])
    for tpu, _ in run_on_both(monkeypatch, lambda: work.__wrapped__()):
        assert tpu.shape == (1, 1, 64)
        np.testing.assert_allclose(tpu[0], exact, rtol=BFLOAT16, atol=32 * 2**-20)


@pytest.mark.usefixtures("one_device")
def test_a_repeated_query_gives_the_same_attention_output(monkeypatch):
    q, k, v = random((2, 1, 4, 8), 0), random((2, 4, 16, 8), 1), random((2, 4, 16, 8), 2)
    positions = np.array([[15], [3]])

    def work():
        return jax.jit(
            lambda q, k, v: attention.cached_attention(q, LayerCache(k, v), positions)
        )(q, k, v)  # fmt: skip

    for tpu, cpu in run_on_both(monkeypatch, work):
        np.testing.assert_allclose(tpu, cpu, atol=16 * 2**-23)


@pytest.mark.usefixtures("one_device")
def test_rope_with_a_product_that_swaps_the_halves_of_a_head(monkeypatch):
    """Values and gradients, in bfloat16; the product is exact."""
    config = tiny_model()
    x, dy = random((2, 16, 4, 8), 0, "bfloat16"), random((2, 16, 4, 8), 1, "bfloat16")

    def work():
        def rotated(x):
            positions = jnp.broadcast_to(jnp.arange(16), (2, 16))
            return rope.apply_rope(x, rope.rope_sin_cos(config, positions), 0.5)

        def value_and_gradient(x):
            y, vjp = jax.vjp(rotated, x)
            return y, *vjp(dy)

        return jax.jit(value_and_gradient)(x)

    for tpu, cpu in run_on_both(monkeypatch, work):
        # The two may round a number to different sides: one step of bfloat16. If terms cancel, the
        # error is that of float32.
        np.testing.assert_allclose(tpu, cpu, rtol=2 * BFLOAT16, atol=2**-20)
