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
init_model = jax.jit(Llama, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def loss(config, model, tokens, positions, segments, targets):
    logits = forward(config, model, tokens, positions, segments)
    chosen = jnp.arange(config.vocab_size) == targets[..., None]
    nll = jax.nn.logsumexp(logits, -1) - jnp.sum(jnp.where(chosen, logits, 0), -1)
    return jnp.sum(jnp.where(targets >= 0, nll, 0))


@pytest.fixture(scope="module")
def model_and_logits():
    with jax.set_mesh(one_device_mesh()):
        model = init_model(CONFIG, jax.random.key(0))
        return model, np.asarray(forward(CONFIG, model, TOKENS))


def shard_model(model):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_model(CONFIG))
    return jax.device_put(model, shardings)


def test_initial_weights_are_the_same_on_every_mesh(model_and_logits):
    with jax.set_mesh(mesh_of((2, 2, 2))):
        model = init_model(CONFIG, jax.random.key(0))
    for sharded, expected in zip(*map(jax.tree.leaves, (model, model_and_logits[0])), strict=True):
        np.testing.assert_allclose(sharded, expected, rtol=1e-6)


@pytest.mark.parametrize("mesh", MESHES[1:] + CONTEXT_MESHES)
def test_logits_agree_on_every_mesh(model_and_logits, mesh):
    with jax.set_mesh(mesh_of(mesh)):
        model = shard_model(model_and_logits[0])
        logits = forward(CONFIG, model, shard_array(TOKENS, "BT"))
        assert logits.sharding.spec == activation_spec("BSV")
        np.testing.assert_allclose(logits, model_and_logits[1], atol=1e-5)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(config, model, cache, tokens, lengths=None):
    """Returns the logits [B, T, V] of the next tokens of a batch, and the cache with the tokens."""
    x_BTD, cache = forward_cached(config, model, cache, tokens, lengths)
    return output_head(config, model, x_BTD), cache


def empty_cache(config, slots=24):
    return jax.jit(init_cache, static_argnums=(0, 1, 2))(config, 8, slots)


@pytest.mark.parametrize("mesh", MESHES)
def test_cached_decoding_equals_the_full_pass(model_and_logits, mesh):
    with jax.set_mesh(mesh_of(mesh)):
        model = shard_model(model_and_logits[0])
        logits, cache = advance(
            CONFIG, model, empty_cache(CONFIG), shard_array(TOKENS[:, :8], "BT")
        )
        parts = [np.asarray(logits)]
        for t in range(8, 16):
            logits, cache = advance(CONFIG, model, cache, shard_array(TOKENS[:, t : t + 1], "BT"))
            parts.append(np.asarray(logits))
    np.testing.assert_allclose(np.concatenate(parts, 1), model_and_logits[1], atol=1e-5)


@pytest.mark.usefixtures("one_device")
class TestOnOneDevice:
    def test_a_batch_of_8_equals_8_batches_of_1(self, model_and_logits):
        model, logits = model_and_logits
        rows = [forward(CONFIG, model, TOKENS[i : i + 1]) for i in range(8)]
        np.testing.assert_allclose(np.concatenate(rows), logits, atol=1e-5)

    def test_rows_of_different_lengths_continue_from_their_ends(self, model_and_logits):
        model, logits = model_and_logits
        cache, lengths = empty_cache(CONFIG), np.arange(1, 9, dtype=np.int32)
        # The tokens after a row's length are padding, and later tokens overwrite their slots.
        first, cache = advance(CONFIG, model, cache, TOKENS[:, :8], lengths)
        rest = np.stack([np.roll(row, -n)[:8] for row, n in zip(TOKENS, lengths, strict=True)])
        second, cache = advance(CONFIG, model, cache, rest)
        assert cache.used_B.tolist() == (lengths + 8).tolist()
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(first[row, :n], logits[row, :n], atol=1e-5)
            np.testing.assert_allclose(second[row], logits[row, n : n + 8], atol=1e-5)

    def test_unstacked_layers_give_the_logits_of_stacked_ones(self, model_and_logits):
        model = init_model(CONFIG, jax.random.key(0))
        unstacked = unstack_layers(model)
        assert model.layers.wq[...].is_deleted()
        np.testing.assert_allclose(
            forward(CONFIG, unstacked, TOKENS), model_and_logits[1], atol=1e-5
        )

    def test_an_int8_cache_has_an_error_of_at_most_half_a_step(self, model_and_logits):
        model, logits = model_and_logits
        config = tiny_model(cache_dtype="int8")
        int8_logits, int8_cache = advance(config, model, empty_cache(config), TOKENS)
        _, float_cache = advance(CONFIG, model, empty_cache(CONFIG), TOKENS)
        int8, exact = int8_cache.layers[0], float_cache.layers[0]
        assert int8.k_BKSH.dtype == int8.v_BKSH.dtype == jnp.int8
        for expected, values, scale in (
            (exact.k_BKSH, int8.k_BKSH, int8.k_scale_BKS),
            (exact.v_BKSH, int8.v_BKSH, int8.v_scale_BKS),
        ):
            largest = np.abs(expected).max(-1, keepdims=True)
            error = np.abs(expected - values * scale[..., None])
            assert np.all(error <= largest / 254 * 1.001 + 1e-9)
        # 127 steps up to the largest number: a relative error of at most 0.4 % in keys and values.
        np.testing.assert_allclose(int8_logits, logits, atol=0.05 * float(np.abs(logits).max()))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded_prompts_equal_unpadded_ones(self, model_and_logits, side):
        model, logits = model_and_logits
        length = 11
        at = slice(5, 16) if side == "left" else slice(0, length)
        tokens, segments, positions = (np.zeros((8, 16), np.int32) for _ in range(3))
        tokens[:, at], segments[:, at], positions[:, at] = TOKENS[:, :length], 1, range(length)
        padded = forward(CONFIG, model, tokens, positions, segments)
        np.testing.assert_allclose(padded[:, at], logits[:, :length], atol=1e-5)

    def test_a_packed_row_equals_its_documents_in_separate_rows(self, model_and_logits):
        model, _ = model_and_logits
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
            # One document, padded on the right so that all have one shape.
            document = [np.zeros((1, 16), np.int32) for _ in range(3)] + [
                np.full((1, 16), -1, np.int32)
            ]
            fields = (row, positions, segments > 0, targets)
            for array, packed_array in zip(document, fields, strict=True):
                array[:, :n] = packed_array[:, part]
            logits = forward(CONFIG, model, *document[:3])
            np.testing.assert_allclose(packed[:, part], logits[:, :n], atol=1e-5)
            grads = jax.tree.map(jnp.add, grads, gradient(CONFIG, model, *document))
        for ours, theirs in zip(*map(jax.tree.leaves, (packed_grads, grads)), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(np.abs(theirs).max()))

    def test_each_remat_policy_saves_the_arrays_it_names(self):
        """Memory falls from policy to policy by the size of the arrays that it no longer saves."""
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
        a_float = 4 * B * T * L  # bytes of one float32 for each token and layer
        D, F, NH, KH = 32, 64, 64, 32
        assert none > products
        assert products - projections == pytest.approx(a_float * (D + 2 * F), rel=0.1)
        assert projections - attention == pytest.approx(a_float * (NH + 2 * KH), rel=0.1)
        # Also the log of the softmax denominators, one for each head. The difference is larger
        # because the backward pass of `full` allocates attention's buffers again.
        assert attention - full > a_float * (NH + 8)

    def test_offloading_needs_an_accelerator(self):
        with pytest.raises(InputError, match="remat offload needs a TPU or GPU: use full"):
            forward(tiny_model(remat="offload"), init_model(CONFIG, jax.random.key(0)), TOKENS)

    def test_a_tied_head_equals_the_transposed_embedding(self, model_and_logits):
        config = tiny_model(tied_head=True)
        model = init_model(config, jax.random.key(0))
        assert model.output is None
        untied = jax.tree.map(jnp.copy, model_and_logits[0])
        untied.tok_embeddings, untied.layers, untied.norm = (
            model.tok_embeddings, model.layers, model.norm,
        )  # fmt: skip
        untied.output[...] = model.tok_embeddings[...].T
        tied, separate = (forward(c, m, TOKENS) for c, m in ((config, model), (CONFIG, untied)))
        np.testing.assert_allclose(tied, separate, atol=1e-5)

    def test_logits_with_bfloat16_activations_are_close_to_float32(self, model_and_logits):
        model, logits = model_and_logits
        half = forward(tiny_model(dtype="bfloat16"), model, TOKENS)
        assert half.dtype == jnp.float32
        # 8 bits of mantissa, a dozen consecutive roundings: 12 · 2^-9 of the largest logit.
        assert float(jnp.abs(half - logits).max()) < 12 * 2**-9 * float(np.abs(logits).max()) * 2

    def test_the_compiled_program_does_not_grow_with_depth(self):
        def instructions(n_layers):
            config = tiny_model(n_layers=n_layers)
            model = jax.eval_shape(partial(Llama, config), jax.random.key(0))
            gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
            compiled = gradient.lower(config, model, *(TOKENS,) * 4).compile()
            return compiled.as_text().count(" = ")

        # Instructions, not seconds: compile time grows with them, but also depends on the machine.
        assert 0.95 < instructions(32) / instructions(4) < 1.05


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", REFERENCES)
def test_logits_equal_those_of_metas_code(shared_data, name):
    expected = np.load((shared_data / "meta_reference" / name).parent / "logits.npz")
    config, model = load_reference(shared_data / "meta_reference" / name)
    logits = forward(config, model, expected["tokens"])
    np.testing.assert_allclose(logits, expected["logits"], atol=5e-5)
    if "long_tokens" in expected:
        logits = forward(config, model, expected["long_tokens"])
        positions = expected["long_positions"]
        np.testing.assert_allclose(logits[:, positions], expected["long_logits"], atol=5e-5)
