"""Low-rank pairs: initialization, attaching, merging, and their products in every storage."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MESHES, mesh_of, tiny_model
from flax import nnx

from llama_jax.checkpoint.tree import eval_shape_on_mesh
from llama_jax.config.lora import LoraConfig
from llama_jax.errors import InputError
from llama_jax.inference.generate import generate
from llama_jax.inference.sampling import Sampling
from llama_jax.model import transformer
from llama_jax.model.linear_transposed import Transposed
from llama_jax.model.lora import Adapted, Adapters, attach, is_adapted, low_rank_dims, merge
from llama_jax.model.quantize import MATRIX_DIMS, output_dims
from llama_jax.model.weights import Llama, quantize_model, unstack_layers
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.parallel.sharding import WEIGHT_AXES

MODEL = tiny_model(n_kv_heads=4)
LORA = LoraConfig(rank=4, alpha=6.0)
TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (8, 12)).astype(np.int32)
# Largest difference between merged and unmerged logits, which are of the order of 1: xW + s(xA)B
# and x(W + sAB) are rounded differently, in each of 7 · 2 products of up to 64 terms.
BOUND = 5e-5

init = jax.jit(Llama, static_argnums=0)
init_adapters = jax.jit(Adapters, static_argnums=(0, 1))
forward = jax.jit(transformer.forward, static_argnums=0)


def trained_adapters(lora=LORA, model=MODEL):
    """Returns pairs on the current mesh whose b is not zero."""
    adapters = init_adapters(model, lora, jax.random.key(1))
    rng = np.random.default_rng(2)
    for name in lora.targets:
        b = getattr(adapters.layers, name).b
        numbers = rng.standard_normal(b.shape, np.float32) * 0.05
        b[...] = jax.device_put(numbers, b[...].sharding)
    return adapters


def test_a_is_drawn_as_peft_draws_it_and_b_is_zero(one_device):
    adapters = init_adapters(replace(MODEL, dim=512), replace(LORA, rank=16), jax.random.key(0))
    for name, dims in MATRIX_DIMS.items():
        pair = getattr(adapters.layers, name)
        a = np.asarray(pair.a[...])
        limit = np.prod(a.shape[1:-1]) ** -0.5
        assert np.abs(a).max() <= limit, name
        # The standard error of n uniform numbers' variance is below 1/√n of it.
        assert np.var(a) == pytest.approx(limit**2 / 3, rel=4 * a.size**-0.5), (name, dims)
        assert not np.asarray(pair.b[...]).any()
    assert not np.array_equal(adapters.layers.wk.a[...], adapters.layers.wv.a[...])
    assert not np.array_equal(adapters.layers.wk.a[0], adapters.layers.wk.a[1])


def test_the_pair_of_a_matrix_does_not_depend_on_the_other_targets(one_device):
    everything = init_adapters(MODEL, LORA, jax.random.key(3))
    some = init_adapters(MODEL, replace(LORA, targets=("w2", "wk")), jax.random.key(3))
    assert sorted(vars(some.layers).keys() & MATRIX_DIMS.keys()) == ["w2", "wk"]
    np.testing.assert_array_equal(some.layers.wk.a[...], everything.layers.wk.a[...])


def test_pairs_are_sharded_like_their_matrices_and_rank_is_never_split():
    assert WEIGHT_AXES["R"] is None
    with jax.set_mesh(mesh_of((2, 2, 2))):
        adapters = init_adapters(MODEL, LORA, jax.random.key(0))
        model = init(MODEL, jax.random.key(0))
    for name, dims in MATRIX_DIMS.items():
        pair, w = getattr(adapters.layers, name), getattr(model.layers, name)
        a_dims, b_dims = low_rank_dims(dims)
        assert a_dims[:-1] + b_dims[1:] == dims
        *a_spec, r = pair.a[...].sharding.spec[1:]
        assert (r, pair.b[...].sharding.spec[1]) == (None, None)
        assert (*a_spec, *pair.b[...].sharding.spec[2:]) == w[...].sharding.spec[1:]


@pytest.mark.parametrize("targets", [tuple(MATRIX_DIMS), ("wq", "wv")])
def test_untrained_pairs_change_no_bit_of_the_logits(one_device, targets):
    model, lora = init(MODEL, jax.random.key(0)), replace(LORA, targets=targets)
    adapted = attach(lora, model, init_adapters(MODEL, lora, jax.random.key(1)))
    assert is_adapted(adapted)
    assert not is_adapted(model)  # the original is as it was
    assert isinstance(adapted.layers.wq, Adapted)
    expected = np.asarray(forward(MODEL, model, TOKENS))
    np.testing.assert_array_equal(forward(MODEL, adapted, TOKENS), expected)


def test_merged_equals_unmerged_on_every_mesh():
    with jax.set_mesh(one_device_mesh()):
        model, adapters = init(MODEL, jax.random.key(0)), trained_adapters()
        base = np.asarray(forward(MODEL, model, TOKENS))
        expected = np.asarray(forward(MODEL, merge(LORA, model, adapters), TOKENS))
        arrays = jax.tree.map(np.asarray, (model, adapters))
    assert np.abs(expected - base).max() > 0.1
    for mesh in MESHES:
        with jax.set_mesh(mesh_of(mesh)):
            abstract = eval_shape_on_mesh(initial, jax.random.key(0))
            like = jax.tree.map(lambda leaf: leaf.sharding, abstract)
            logits = forward(MODEL, attach(LORA, *jax.device_put(arrays, like)), TOKENS)
        np.testing.assert_allclose(logits, expected, atol=BOUND)


def initial(key):
    return Llama(MODEL, key), Adapters(MODEL, LORA, key)


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_merging_is_the_sum_in_float64(one_device, rank_stabilized):
    lora = replace(LORA, rank_stabilized=rank_stabilized)
    scale = 6 / 4 ** (0.5 if rank_stabilized else 1)
    model, adapters = init(MODEL, jax.random.key(0)), trained_adapters(lora)
    merged = merge(lora, model, adapters)
    for name, dims in MATRIX_DIMS.items():
        pair = getattr(adapters.layers, name)
        arrays = getattr(model.layers, name), pair.a, pair.b
        w, a, b = (np.asarray(x[...], np.float64) for x in arrays)
        a_dims, b_dims = low_rank_dims(dims)
        expected = w + scale * np.einsum(f"L{a_dims},L{b_dims}->L{dims}", a, b)
        np.testing.assert_allclose(getattr(merged.layers, name)[...], expected, atol=1e-6)


def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once(one_device):
    config = replace(MODEL, param_dtype="bfloat16")
    model, adapters = init(config, jax.random.key(0)), trained_adapters()
    merged = merge(LORA, model, adapters).layers.w1[...]
    pair, w = adapters.layers.w1, np.asarray(model.layers.w1[...], np.float32)
    exact = w + LORA.scale * np.asarray(pair.a[...]) @ np.asarray(pair.b[...])
    assert merged.dtype == jnp.bfloat16
    expected = exact.astype(jnp.bfloat16)
    # A last bit of the float32 sum may decide a rounding.
    assert np.mean(np.asarray(merged) == expected) > 0.999


def test_the_gradient_of_an_int8_product_is_that_of_the_dequantized_matrix(one_device):
    """Of every product: hidden states and pairs have the gradients of a float32 base."""
    config, model = MODEL, init(MODEL, jax.random.key(0))
    quantized_config, quantized = quantize_model(config, model)
    adapters = trained_adapters()

    def loss(config, base, adapters):
        model = attach(LORA, base, adapters)
        return jnp.sum(jnp.sin(transformer.forward(config, model, TOKENS)))

    gradient = jax.jit(jax.grad(loss, argnums=2), static_argnums=0)
    grads = gradient(quantized_config, quantized, adapters)
    dequantized = jax.tree.map(lambda leaf: leaf, model)
    dequantized.tok_embeddings = dequantize(quantized.tok_embeddings, "VD")
    dequantized.output = dequantize(quantized.output, "DV")
    for name, dims in MATRIX_DIMS.items():
        setattr(dequantized.layers, name, dequantize(getattr(quantized.layers, name), f"L{dims}"))
    expected = gradient(config, dequantized, adapters)
    for ours, theirs in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def dequantize(matrix, dims):
    out = "L" * dims.startswith("L") + output_dims(dims.removeprefix("L"))
    values = jnp.asarray(matrix.values[...], jnp.float32)
    return nnx.Param(jnp.einsum(f"{dims},{out}->{dims}", values, matrix.scale[...]))


def test_pairs_are_not_merged_into_int8(one_device):
    config, model = quantize_model(MODEL, init(MODEL, jax.random.key(0)))
    with pytest.raises(InputError, match="can't be merged into int8 matrices"):
        merge(LORA, model, trained_adapters())
    assert config.quantized == "int8"


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_decoding_with_pairs_kept_apart_generates_the_merged_model_s_tokens(one_device, storage):
    """Prefill and decode steps, with the layers unstacked and transposed as for inference."""
    model, adapters = init(MODEL, jax.random.key(0)), trained_adapters()
    config = MODEL
    if storage == "int8":
        config, model = quantize_model(MODEL, model)
    adapted = attach(LORA, model, adapters)
    lengths, seeds = np.full(8, TOKENS.shape[1]), np.arange(8)
    if storage == "bfloat16":
        config = replace(config, dtype="bfloat16")

    def run(model):
        return generate(config, model, TOKENS, lengths, Sampling(), seeds, max_new_tokens=8)

    expected = run(adapted)
    unstacked = attach(LORA, unstack_layers(jax.tree.map(jnp.copy, model)), adapters)
    transposed = isinstance(unstacked.layers[0].wq.base, Transposed)
    assert transposed == (storage != "int8")
    found = run(unstacked)
    tolerance = 0.05 if storage == "bfloat16" else BOUND
    np.testing.assert_allclose(found.logprobs_Bn[:, 0], expected.logprobs_Bn[:, 0], atol=tolerance)
    if storage != "bfloat16":
        np.testing.assert_array_equal(found.tokens_Bn, expected.tokens_Bn)
