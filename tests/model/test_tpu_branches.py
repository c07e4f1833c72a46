"""What only a TPU runs, on the CPU: forced branches and interpreted kernels, beside the CPU's own.

Not here: attention's splash kernel on every mesh (test_attention.py), scatters in two steps and
meshes of slices (test_sharding.py), int8 products in one piece (test_quantize.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, tiny_model
from flax import nnx

from llama_jax.model import attention, cache, linear, linear_cpu, remat, rope
from llama_jax.model.cache import LayerCache, init_cache
from llama_jax.model.transformer import forward, forward_cached, output_head
from llama_jax.model.weights import Llama, unstack_layers

BFLOAT16 = 2.0**-8  # half a step of rounding, of a number's size


def of_both(monkeypatch, work):
    """Returns what `work()` returns where the branches of a TPU are taken, and where not."""
    found = []
    for platform in ("tpu", "cpu"):
        for module in (attention, cache, linear, linear_cpu, rope):
            monkeypatch.setattr(module, "platform", lambda platform=platform: platform)
        found.append(jax.tree.map(lambda x: np.asarray(x, np.float32), work()))
    return zip(*(jax.tree.leaves(result) for result in found), strict=True)


def random(shape, seed, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def test_loss_and_gradients_of_a_training_step(monkeypatch):
    """Splash attention by itself (`auto`), gradients of w1 and w3 as [F, D], products as asked."""
    config = tiny_model(remat="products", context=128)
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, 129))
    segments_BT = np.sort(np.random.default_rng(1).integers(1, 4, (2, 128)))
    used = []
    splash = attention.attention_splash.attention
    watched = lambda *args: used.append(len(args)) or splash(*args)  # noqa: E731
    monkeypatch.setattr(attention.attention_splash, "attention", watched)

    def work():
        def loss(model, tokens_BT, targets_BT):
            logits = forward(config, model, tokens_BT, None, segments_BT)
            right = jnp.arange(config.vocab_size) == targets_BT[..., None]
            return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.sum(logits * right, -1))

        return jax.jit(jax.value_and_grad(loss))(model, tokens_BT[:, :-1], tokens_BT[:, 1:])

    with jax.set_mesh(mesh_of((1, 2, 2))):
        model = jax.jit(Llama, static_argnums=0)(config, jax.random.key(0))
        for tpu, cpu in of_both(monkeypatch, work):
            # Sums of at most 256 float32 terms whose sizes add up to about 1.
            np.testing.assert_allclose(tpu, cpu, atol=256 * 2**-24)
    assert len(used) > 0


@pytest.mark.usefixtures("one_device")
def test_the_backward_pass_of_splash_that_is_not_fused():
    """More than two blocks of keys; three blocks of 128 here."""
    B, T, H = 1, 384, 8
    sizes = attention.attention_splash._block_sizes(T, T)
    assert not sizes.use_fused_bwd_kernel
    segments_BT = np.sort(np.random.default_rng(1).integers(1, 4, (B, T)))
    q, k, v, weights = (random((B, T, 2, H), i) / np.sqrt(np.sqrt(H)) for i in range(4))

    def made(kernel):
        def loss(q, k, v):
            return jnp.sum(weights * attention.attention(q, k, v, segments_BT, kernel))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for splash, xla in zip(made("splash"), made("xla"), strict=True):
        np.testing.assert_allclose(splash, xla, atol=T * 2**-24)


@pytest.mark.usefixtures("one_device")
def test_a_layers_input_in_the_hosts_memory_gives_the_same_gradients(monkeypatch):
    monkeypatch.setattr(remat, "platform", lambda: "tpu")
    tokens_BT = np.random.default_rng(0).integers(0, 320, (2, 16))
    model = jax.jit(Llama, static_argnums=0)(tiny_model(n_layers=1), jax.random.key(0))

    def gradients(config):
        return jax.jit(jax.grad(lambda m: jnp.mean(forward(config, m, tokens_BT) ** 2)))(model)

    kinds = (gradients(tiny_model(n_layers=1, remat=kind)) for kind in ("offload", "full"))
    jax.tree.map(np.testing.assert_array_equal, *kinds)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("one_device")
def test_one_text_token_by_token(monkeypatch, dtype):
    """A row and a query twice and eight times over, rotation by a product, weights as stored."""
    config = tiny_model(n_kv_heads=8, dtype=dtype, param_dtype=dtype)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (6, 1, 1))

    def work():
        model = unstack_layers(jax.jit(Llama, static_argnums=0)(config, jax.random.key(0)))

        def step(cache, token_BT):
            x_BTD, cache = forward_cached(config, model, cache, token_BT)
            return cache, output_head(config, model, x_BTD)

        read = jax.jit(lambda tokens: jax.lax.scan(step, init_cache(config, 1, 8), tokens)[1])
        return read(tokens)

    # float32: sums of at most 64 terms, three in a row of each layer. bfloat16: about ten roundings
    # on the way through two layers, of numbers of the logits' size.
    for tpu, cpu in of_both(monkeypatch, work):
        size = np.max(np.abs(cpu))
        tolerance = size * (10 * BFLOAT16 if dtype == "bfloat16" else 6 * 64 * 2**-24)
        np.testing.assert_allclose(tpu, cpu, atol=tolerance)
        assert size > 1


@pytest.mark.usefixtures("one_device")
def test_a_row_twice_gives_its_product_once(monkeypatch):
    config = tiny_model(dtype="bfloat16")
    x, w = random((1, 1, 32), 0, "bfloat16"), nnx.Param(random((32, 64), 1, "bfloat16"))
    work = jax.jit(lambda: linear.matmul(config, "BTD,DF->BTF", x, w))
    exact = np.float32(x[0]) @ np.float32(w[...])
    for tpu, _ in of_both(monkeypatch, lambda: work.__wrapped__()):
        assert tpu.shape == (1, 1, 64)
        np.testing.assert_allclose(tpu[0], exact, rtol=BFLOAT16, atol=32 * 2**-20)


@pytest.mark.usefixtures("one_device")
def test_a_query_eight_times_over_sees_the_same_cache(monkeypatch):
    q, k, v = random((2, 1, 4, 8), 0), random((2, 4, 16, 8), 1), random((2, 4, 16, 8), 2)
    positions = np.array([[15], [3]])

    def work():
        return jax.jit(
            lambda q, k, v: attention.cached_attention(q, LayerCache(k, v), positions)
        )(q, k, v)  # fmt: skip

    for tpu, cpu in of_both(monkeypatch, work):
        np.testing.assert_allclose(tpu, cpu, atol=16 * 2**-23)


@pytest.mark.usefixtures("one_device")
def test_rotation_by_a_product_that_swaps_the_halves_of_a_head(monkeypatch):
    """Values and gradients, in bfloat16: the product itself is exact."""
    config = tiny_model()
    x, dy = random((2, 16, 4, 8), 0, "bfloat16"), random((2, 16, 4, 8), 1, "bfloat16")

    def work():
        def rotated(x):
            positions = jnp.broadcast_to(jnp.arange(16), (2, 16))
            return rope.apply_rope(x, rope.rope_sin_cos(config, positions), 0.5)

        def both(x):
            y, back = jax.vjp(rotated, x)
            return y, *back(dy)

        return jax.jit(both)(x)

    for tpu, cpu in of_both(monkeypatch, work):
        # A rounding may fall to the other side: a whole step. Where terms cancel, float32's.
        np.testing.assert_allclose(tpu, cpu, rtol=2 * BFLOAT16, atol=2**-20)
