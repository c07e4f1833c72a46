from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONTEXT_MESHES, MESHES, REFERENCES, load_reference, mesh_of, tiny_model

from llama_jax.checkpoint.tree import abstract_model
from llama_jax.errors import InputError
from llama_jax.model.cache import init_cache
from llama_jax.model.transformer import forward, forward_cached, output_head
from llama_jax.model.weights import Llama, unstack_layers
from llama_jax.parallel.mesh import one_device_mesh, shard_array
from llama_jax.parallel.sharding import activation_spec

CONFIG = tiny_model()
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (8, 16)).astype(np.int32)
forward = jax.jit(forward, static_argnums=0)
make = jax.jit(Llama, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def loss(config, model, tokens, positions, segments, targets):
    logits = forward(config, model, tokens, positions, segments)
    chosen = jnp.arange(config.vocab_size) == targets[..., None]
    nll = jax.nn.logsumexp(logits, -1) - jnp.sum(jnp.where(chosen, logits, 0), -1)
    return jnp.sum(jnp.where(targets >= 0, nll, 0))


@pytest.fixture(scope="module")
def on_one_device():
    with jax.set_mesh(one_device_mesh()):
        model = make(CONFIG, jax.random.key(0))
        return model, np.asarray(forward(CONFIG, model, TOKENS))


def on_this_mesh(model):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_model(CONFIG))
    return jax.device_put(model, shardings)


def test_fresh_weights_are_the_same_on_every_mesh(on_one_device):
    with jax.set_mesh(mesh_of((2, 2, 2))):
        model = make(CONFIG, jax.random.key(0))
    for there, here in zip(*map(jax.tree.leaves, (model, on_one_device[0])), strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-6)


@pytest.mark.parametrize("mesh", MESHES[1:] + CONTEXT_MESHES)
def test_logits_agree_on_every_mesh(on_one_device, mesh):
    with jax.set_mesh(mesh_of(mesh)):
        model = on_this_mesh(on_one_device[0])
        logits = forward(CONFIG, model, shard_array(TOKENS, "BT"))
        assert logits.sharding.spec == activation_spec("BSV")
        np.testing.assert_allclose(logits, on_one_device[1], atol=1e-5)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(config, model, cache, tokens, lengths=None):
    """The logits [B, T, V] of the next tokens of a batch, and the cache after them."""
    x_BTD, cache = forward_cached(config, model, cache, tokens, lengths)
    return output_head(config, model, x_BTD), cache


def empty_cache(config, slots=24):
    return jax.jit(init_cache, static_argnums=(0, 1, 2))(config, 8, slots)


@pytest.mark.parametrize("mesh", MESHES)
def test_cached_decoding_equals_the_full_pass(on_one_device, mesh):
    with jax.set_mesh(mesh_of(mesh)):
        model = on_this_mesh(on_one_device[0])
        logits, cache = advance(
            CONFIG, model, empty_cache(CONFIG), shard_array(TOKENS[:, :8], "BT")
        )
        parts = [np.asarray(logits)]
        for t in range(8, 16):
            logits, cache = advance(CONFIG, model, cache, shard_array(TOKENS[:, t : t + 1], "BT"))
            parts.append(np.asarray(logits))
    np.testing.assert_allclose(np.concatenate(parts, 1), on_one_device[1], atol=1e-5)


@pytest.mark.usefixtures("one_device")
class TestOnOneDevice:
    def test_a_batch_of_8_equals_8_batches_of_1(self, on_one_device):
        model, logits = on_one_device
        apart = [forward(CONFIG, model, TOKENS[i : i + 1]) for i in range(8)]
        np.testing.assert_allclose(np.concatenate(apart), logits, atol=1e-5)

    def test_rows_continue_from_places_of_their_own(self, on_one_device):
        model, logits = on_one_device
        cache, lengths = empty_cache(CONFIG), np.arange(1, 9, dtype=np.int32)
        # What stands behind a row's length is no part of it, and is written over.
        first, cache = advance(CONFIG, model, cache, TOKENS[:, :8], lengths)
        rest = np.stack([np.roll(row, -n)[:8] for row, n in zip(TOKENS, lengths, strict=True)])
        second, cache = advance(CONFIG, model, cache, rest)
        assert cache.used_B.tolist() == (lengths + 8).tolist()
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(first[row, :n], logits[row, :n], atol=1e-5)
            np.testing.assert_allclose(second[row], logits[row, n : n + 8], atol=1e-5)

    def test_layers_one_by_one_give_what_stacked_ones_give(self, on_one_device):
        model = make(CONFIG, jax.random.key(0))
        apart = unstack_layers(model)
        assert model.layers.wq[...].is_deleted()
        np.testing.assert_allclose(forward(CONFIG, apart, TOKENS), on_one_device[1], atol=1e-5)

    def test_an_int8_cache_holds_numbers_to_half_a_step(self, on_one_device):
        model, logits = on_one_device
        config = tiny_model(cache_dtype="int8")
        rounded, cache = advance(config, model, empty_cache(config), TOKENS)
        _, exact = advance(CONFIG, model, empty_cache(CONFIG), TOKENS)
        first, same = cache.layers[0], exact.layers[0]
        assert first.k_BKSH.dtype == first.v_BKSH.dtype == jnp.int8
        for whole, numbers, scale in (
            (same.k_BKSH, first.k_BKSH, first.k_scale_BKS),
            (same.v_BKSH, first.v_BKSH, first.v_scale_BKS),
        ):
            largest = np.abs(whole).max(-1, keepdims=True)
            error = np.abs(whole - numbers * scale[..., None])
            assert np.all(error <= largest / 254 * 1.001 + 1e-9)
        # 127 steps up to the largest number: a relative error of 0.4 % at most in keys and values.
        np.testing.assert_allclose(rounded, logits, atol=0.05 * float(np.abs(logits).max()))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded_prompts_equal_unpadded_ones(self, on_one_device, side):
        model, logits = on_one_device
        length = 11
        at = slice(5, 16) if side == "left" else slice(0, length)
        tokens, segments, positions = (np.zeros((8, 16), np.int32) for _ in range(3))
        tokens[:, at], segments[:, at], positions[:, at] = TOKENS[:, :length], 1, range(length)
        padded = forward(CONFIG, model, tokens, positions, segments)
        np.testing.assert_allclose(padded[:, at], logits[:, :length], atol=1e-5)

    def test_a_packed_row_equals_its_documents_run_apart(self, on_one_device):
        model, _ = on_one_device
        lengths = (5, 7, 4)
        row = TOKENS[:1]
        segments = np.repeat([1, 2, 3], lengths)[None].astype(np.int32)
        positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
        targets = np.roll(row, -1)
        targets[:, np.cumsum(lengths) - 1] = -1
        packed = forward(CONFIG, model, row, positions, segments)
        gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
        packed_grads = gradient(CONFIG, model, row, positions, segments, targets)
        grads = jax.tree.map(jnp.zeros_like, model)
        for end, n in zip(np.cumsum(lengths), lengths, strict=True):
            part = slice(end - n, end)
            # Apart, with padding behind, so that all are of one shape.
            alone = [np.zeros((1, 16), np.int32) for _ in range(3)] + [
                np.full((1, 16), -1, np.int32)
            ]
            for field, whole in zip(alone, (row, positions, segments > 0, targets), strict=True):
                field[:, :n] = whole[:, part]
            logits = forward(CONFIG, model, *alone[:3])
            np.testing.assert_allclose(packed[:, part], logits[:, :n], atol=1e-5)
            grads = jax.tree.map(jnp.add, grads, gradient(CONFIG, model, *alone))
        for ours, theirs in zip(*map(jax.tree.leaves, (packed_grads, grads)), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(np.abs(theirs).max()))

    def test_what_is_kept_for_the_backward_pass_is_what_remat_says(self):
        """Memory falls from policy to policy, by what each leaves out."""
        B, T, L = 4, 64, 16
        tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)

        def temporaries(remat):
            config = tiny_model(remat=remat, n_layers=L)
            model = jax.eval_shape(partial(Llama, config), jax.random.key(0))
            gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
            compiled = gradient.lower(config, model, *(tokens,) * 4).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        none, products, projections, attention, full = map(
            temporaries, ("none", "products", "projections", "attention", "full")
        )
        a_float = 4 * B * T * L  # one number for each token and layer
        D, F, NH, KH = 32, 64, 64, 32
        assert none > products
        assert products - projections == pytest.approx(a_float * (D + 2 * F), rel=0.1)
        assert projections - attention == pytest.approx(a_float * (NH + 2 * KH), rel=0.1)
        # The softmax's sums, one a head; and backward makes attention's buffers anew.
        assert attention - full > a_float * (NH + 8)

    def test_offloading_needs_a_host(self):
        with pytest.raises(InputError, match="remat offload needs a TPU or GPU: use full"):
            forward(tiny_model(remat="offload"), make(CONFIG, jax.random.key(0)), TOKENS)

    def test_a_tied_head_is_the_embedding(self, on_one_device):
        config = tiny_model(tied_head=True)
        model = make(config, jax.random.key(0))
        assert model.output is None
        untied = jax.tree.map(jnp.copy, on_one_device[0])
        untied.tok_embeddings, untied.layers, untied.norm = (
            model.tok_embeddings, model.layers, model.norm,
        )  # fmt: skip
        untied.output[...] = model.tok_embeddings[...].T
        tied, separate = (forward(c, m, TOKENS) for c, m in ((config, model), (CONFIG, untied)))
        np.testing.assert_allclose(tied, separate, atol=1e-5)

    def test_bfloat16_activations_follow_float32(self, on_one_device):
        model, logits = on_one_device
        half = forward(tiny_model(dtype="bfloat16"), model, TOKENS)
        assert half.dtype == jnp.float32
        # 8 bits of mantissa, a dozen roundings on the way: 12 · 2^-9 of the logits' size.
        assert float(jnp.abs(half - logits).max()) < 12 * 2**-9 * float(np.abs(logits).max()) * 2

    def test_what_is_compiled_does_not_grow_with_depth(self):
        def instructions(n_layers):
            config = tiny_model(n_layers=n_layers)
            model = jax.eval_shape(partial(Llama, config), jax.random.key(0))
            gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
            compiled = gradient.lower(config, model, *(TOKENS,) * 4).compile()
            return compiled.as_text().count(" = ")

        # Instructions, which compile time follows, and not seconds: those follow the machine too.
        assert 0.95 < instructions(32) / instructions(4) < 1.05


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", REFERENCES)
def test_logits_are_those_of_metas_code(shared_data, name):
    expected = np.load((shared_data / "meta_reference" / name).parent / "logits.npz")
    config, model = load_reference(shared_data / "meta_reference" / name)
    logits = forward(config, model, expected["tokens"])
    np.testing.assert_allclose(logits, expected["logits"], atol=5e-5)
    if "long_tokens" in expected:
        logits = forward(config, model, expected["long_tokens"])
        at = expected["long_positions"]
        np.testing.assert_allclose(logits[:, at], expected["long_logits"], atol=5e-5)
