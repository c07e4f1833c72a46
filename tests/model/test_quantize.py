"""Int8 weights: their error, and that their products equal those of the dequantized weights."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_reference, mesh_of, tiny_model
from flax import nnx

from llama_jax.checkpoint.tree import abstract_model
from llama_jax.errors import InputError
from llama_jax.inference.stream import stream
from llama_jax.model import linear, linear_cpu, linear_transposed, weights
from llama_jax.model.quantize import Int8Matrix, add_offset, output_dims, quantize_int8
from llama_jax.model.transformer import forward
from llama_jax.model.weights import (
    Llama,
    UnstackedLlama,
    decode_layout,
    layer_weights,
    quantize_model,
    restore_layout,
)
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.parallel.sharding import activation_spec
from llama_jax.runtime.cpu import cpu_multiplies_uint8

CONFIG = tiny_model()
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 320, (8, 8)), jnp.int32)
jitted_forward = jax.jit(forward, static_argnums=0)


def tree_equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def both(request):
    """Returns a configuration and its model, then the same quantized, on one device."""
    config = tiny_model(tied_head=request.param)
    with jax.set_mesh(one_device_mesh()):
        model = jax.jit(Llama, static_argnums=0)(config, jax.random.key(0))
        return config, model, *quantize_model(config, model)


def dequantize(values, scale, dims):
    """Returns values · scale, which is exact in float64."""
    axes = tuple(
        dims.index(letter) - len(dims) for letter in dims if letter not in output_dims(dims)
    )
    return values.astype(np.float64) * np.expand_dims(scale.astype(np.float64), axes)


@pytest.mark.parametrize("dims", ["VD", "DNH", "NHD", "DF", "FD", "DV"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_error_is_at_most_half_the_channels_scale(dims, dtype):
    sizes = {"V": 40, "D": 24, "N": 3, "H": 8, "F": 56}
    rng = np.random.default_rng(1)
    channels = [sizes[letter] if letter in output_dims(dims) else 1 for letter in dims]
    w = rng.normal(size=[sizes[letter] for letter in dims]) * 10 ** rng.normal(size=channels)
    w = w.astype(jnp.dtype(dtype))
    values, scale = quantize_int8(w, dims)
    assert (values.dtype, scale.dtype, values.shape) == (np.int8, np.float32, w.shape)
    assert scale.shape == tuple(sizes[letter] for letter in output_dims(dims))
    error = dequantize(values, scale, dims) - w.astype(np.float64)
    # Half a step; and for each of up to 127 steps 2^-20, by which `_STEPS` stretches a step, and 5
    # roundings (of the two constants, the scale, the division, the product) of 2^-24.
    bound = dequantize(np.ones_like(values), scale, dims) * (0.5 + 127 * (2.0**-20 + 5 * 2.0**-24))
    assert np.all(np.abs(error) <= bound)
    assert np.abs(values.astype(int)).max() == 127


def test_channels_of_zeros_and_of_subnormals_become_zeros():
    w = np.zeros((4, 3), np.float32)
    w[:, 1], w[:, 2] = 1e-40, [1, -2, 0.5, 0]
    for values, scale in (
        quantize_int8(w, "DF"),
        jax.jit(quantize_int8, static_argnums=1)(jnp.array(w), "DF"),
    ):
        assert np.asarray(scale).tolist() == [0, 0, np.float32(2) * np.float32(1 / 127)]
        assert np.asarray(values).T.tolist() == [[0] * 4, [0] * 4, [63, -127, 32, 0]]


def test_the_quantized_model_has_the_tree_of_its_configuration(both):
    config, model, new_config, new = both
    assert new_config == replace(config, quantized="int8")
    with jax.set_mesh(one_device_mesh()):
        expected = abstract_model(new_config)
    assert jax.tree.structure(new) == jax.tree.structure(expected)
    for leaf, like in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
    assert new.norm[...] is model.norm[...]
    assert isinstance(model.layers.wq, nnx.Param), "the original model is unchanged"


@pytest.mark.parametrize("product", ["converted", "digits"])
def test_logits_equal_those_of_the_dequantized_weights(both, product, monkeypatch):
    config, model, new_config, new = both
    monkeypatch.setattr(linear, "FEW_ROWS", 64 if product == "digits" else 0)
    like = jax.tree.map(lambda leaf: leaf, model)
    for node, name in [(like, "tok_embeddings"), (like, "output"), *matrices(like.layers)]:
        matrix = getattr(new if node is like else new.layers, name)
        if isinstance(matrix, Int8Matrix):
            values, scale = np.asarray(matrix.values[...]), np.asarray(matrix.scale[...])
            dims = {"wq": "DNH", "wk": "DKH", "wv": "DKH", "wo": "NHD", "w2": "FD"}.get(name, "DF")
            float64 = dequantize(values, scale, "VD" if name == "tok_embeddings" else dims)
            getattr(node, name)[...] = jnp.asarray(float64.astype(np.float32))
    with jax.set_mesh(one_device_mesh()):
        expected = jitted_forward(config, like, TOKENS)
        logits = jax.jit(lambda model: forward(new_config, model, TOKENS))(new)
    # Logits with standard deviation 1, in float32, after 15 consecutive products; measured 2e-6.
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("dims", "stored"), [("DNH", np.int8), ("NHD", np.int8), ("NHD", np.uint8)]
)
def test_products_of_digits_have_the_error_of_the_last_digit(dims, stored, dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 96)) * 10.0 ** rng.integers(-3, 2, (3, 2, 96))
    x[1, 0] = 0
    x = np.asarray(jnp.asarray(x, dtype).astype(jnp.float32))
    values = rng.integers(-127, 128, (4, 5, 96) if dims == "NHD" else (96, 4, 5)).astype(np.int8)
    equation = f"BTD,{dims}->BTNH"
    exact = np.einsum(equation, x.astype(np.float64), values.astype(np.float64))
    with jax.set_mesh(one_device_mesh()):
        values = jax.device_put(values, activation_spec(dims))
        values = add_offset(values) if stored == np.uint8 else values
        assert values.dtype == stored
        product = jax.jit(partial(linear_cpu.einsum_int8, equation))
        y = np.asarray(product(jnp.asarray(x, dtype), values))
        alone = np.asarray(product(jnp.asarray(x[:1, :1], dtype), values))
    # Half a unit of the last digit for each element, and eight roundings to float32.
    unit = 1 / (127 * 256 ** (2 if dtype == "float32" else 1))
    weights = np.einsum(equation, np.abs(x).max(-1, keepdims=True) + 0 * x, abs(values * 1.0))
    assert np.all(abs(y - exact) <= weights * (unit / 2 + 8 * 2.0**-24))
    assert np.array_equal(alone, y[:1, :1])


@pytest.mark.parametrize("stored", [np.int8, np.uint8])
def test_the_compiler_has_a_kernel_for_the_product_of_digits(stored):
    x, w = jnp.ones((1, 1, 96), jnp.float32), np.ones((4, 5, 96), stored)
    with jax.set_mesh(one_device_mesh()):
        product = jax.jit(partial(linear_cpu.einsum_int8, "BTD,NHD->BTNH"))
        program = product.lower(x, jax.device_put(w, activation_spec("NHD"))).compile().as_text()
    # Without YNNPACK such a product takes 20 to 60 times as long.
    assert "__ynn_fusion" in program


@pytest.mark.parametrize("flags", ["", "--xla_cpu_experimental_ynn_fusion_type="])
def test_values_stay_int8_where_xla_has_no_kernel_for_uint8(flags):
    script = "from llama_jax.model.linear_cpu import *; print(has_uint8_kernels())"
    environment = os.environ | {"XLA_FLAGS": flags}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == f"{cpu_multiplies_uint8() and not flags}\n"


@pytest.mark.parametrize("has_kernels", [True, False])
def test_the_decode_layout_on_a_cpu_has_the_logits_of_the_int8_model(
    both, has_kernels, monkeypatch
):
    *_, new_config, new = both
    monkeypatch.setattr(linear_transposed, "has_uint8_kernels", lambda: has_kernels)
    # Not compiled: the compiled function depends on the CPU that this test replaces.
    monkeypatch.setattr(weights, "_transpose", linear_transposed.transpose_weight)
    layers = tuple(layer_weights(new, i) for i in range(new_config.n_layers))
    model = UnstackedLlama(new.tok_embeddings, layers, new.norm, new.output)
    with jax.set_mesh(one_device_mesh()):
        in_layout = decode_layout(model._replace(layers=jax.tree.map(lambda x: x, layers)))
        stored = {w.values.dtype for w in (in_layout.layers[1].w2, in_layout.tok_embeddings)}
        assert stored == {np.dtype("uint8" if has_kernels else "int8")}
        expected = jitted_forward(new_config, new, TOKENS)
        logits = jax.jit(lambda model: forward(new_config, model, TOKENS))(in_layout)
        assert tree_equal(restore_layout(in_layout), model)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def matrices(layers):
    return [(layers, name) for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")]


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 2, 4)])
def test_every_mesh_gives_the_values_and_logits_of_one_device(both, shape):
    config, model, new_config, new = both
    with jax.set_mesh(one_device_mesh()):
        expected = jitted_forward(new_config, new, TOKENS)
    with jax.set_mesh(mesh_of(shape)):
        sharded = jax.device_put(model, jax.tree.map(lambda a: a.sharding, abstract_model(config)))
        _, quantized = quantize_model(config, sharded)
        for leaf, like in zip(
            jax.tree.leaves(quantized), jax.tree.leaves(abstract_model(new_config)), strict=True
        ):
            assert leaf.sharding == like.sharding
        assert tree_equal(quantized, new)
        logits = jitted_forward(new_config, quantized, TOKENS)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_int8_hardly_changes_stories260k(shared_data):
    folder = shared_data / "stories260K"
    reference = json.loads((folder / "stories260K_reference.json").read_text())
    ids = np.load(folder / "stories260K_reference.npz")["text_ids"][None].astype(np.int32)
    with jax.set_mesh(one_device_mesh()):
        config, model = load_reference(folder / "hf")
        expected = np.asarray(jitted_forward(config, model, ids)[0])
        new_config, new = quantize_model(config, model)
        w1, int8_w1 = np.asarray(model.layers.w1[...]), new.layers.w1
        values, scale = np.asarray(int8_w1.values[...]), np.asarray(int8_w1.scale[...])
        error = w1 - dequantize(values, scale, "DF")
        # A step is 1/127 of a channel's largest of 64 elements, which is about 2.6 standard
        # deviations. A uniform error within a step has a standard deviation of 1/√12 step:
        # 2.6 / 127 / √12 = 0.6 %.
        assert 0.005 < np.std(error) / np.std(w1) < 0.007
        # The products have independent errors of this size, and the logits are their sum: about the
        # same, slightly more for paths through two or three products. Measured 0.87 %.
        logits = np.asarray(jitted_forward(new_config, new, ids)[0])
        assert 0.005 < np.std(logits - expected) / np.std(expected) < 0.012
        assert np.mean(logits.argmax(-1) == expected.argmax(-1)) > 0.95
        prompt, greedy = (reference["prompts"][0][key] for key in ("ids", "greedy_ids"))
        # The 58th token is the first that differs from the unquantized model's.
        assert list(stream(new_config, new, prompt, max_new_tokens=48)) == greedy[:48]


def test_a_quantized_model_cannot_be_quantized_again(both):
    *_, new_config, new = both
    with pytest.raises(
        InputError, match="is already quantized to int8: quantize the original instead"
    ):
        quantize_model(new_config, new)
