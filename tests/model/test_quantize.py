"""Int8 weights: how far off they are, and that their products are those of what they stand for."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_reference, mesh_of, tiny_model
from flax import nnx

from llama_jax.checkpoint.tree import abstract_model
from llama_jax.errors import InputError
from llama_jax.inference.stream import stream
from llama_jax.model import linear, linear_cpu
from llama_jax.model.quantize import Int8Matrix, output_dims, quantize_int8
from llama_jax.model.transformer import forward
from llama_jax.model.weights import Llama, quantize_model
from llama_jax.parallel.mesh import one_device_mesh

CONFIG = tiny_model()
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 320, (8, 8)), jnp.int32)
full = jax.jit(forward, static_argnums=0)


def tree_equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def both(request):
    """A model, and it quantized, with configurations, on one device."""
    config = tiny_model(tied_head=request.param)
    with jax.set_mesh(one_device_mesh()):
        model = jax.jit(Llama, static_argnums=0)(config, jax.random.key(0))
        return config, model, *quantize_model(config, model)


def expanded(values, scale, dims):
    """Returns values · scale, which is exact in float64."""
    axes = tuple(
        dims.index(letter) - len(dims) for letter in dims if letter not in output_dims(dims)
    )
    return values.astype(np.float64) * np.expand_dims(scale.astype(np.float64), axes)


@pytest.mark.parametrize("dims", ["VD", "DNH", "NHD", "DF", "FD", "DV"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_number_is_off_by_more_than_half_its_channels_scale(dims, dtype):
    sizes = {"V": 40, "D": 24, "N": 3, "H": 8, "F": 56}
    rng = np.random.default_rng(1)
    channels = [sizes[letter] if letter in output_dims(dims) else 1 for letter in dims]
    w = rng.normal(size=[sizes[letter] for letter in dims]) * 10 ** rng.normal(size=channels)
    w = w.astype(jnp.dtype(dtype))
    values, scale = quantize_int8(w, dims)
    assert (values.dtype, scale.dtype, values.shape) == (np.int8, np.float32, w.shape)
    assert scale.shape == tuple(sizes[letter] for letter in output_dims(dims))
    off = expanded(values, scale, dims) - w.astype(np.float64)
    # Half a step, and of up to 127 steps: 2^-20, by which a step is stretched, and 5 roundings (of
    # the two constants, the scale, the division, the product) of 2^-24.
    bound = expanded(np.ones_like(values), scale, dims) * (0.5 + 127 * (2.0**-20 + 5 * 2.0**-24))
    assert np.all(np.abs(off) <= bound)
    assert np.abs(values.astype(int)).max() == 127


def test_channels_of_nothing_stay_nothing():
    w = np.zeros((4, 3), np.float32)
    w[:, 1], w[:, 2] = 1e-40, [1, -2, 0.5, 0]
    for values, scale in (
        quantize_int8(w, "DF"),
        jax.jit(quantize_int8, static_argnums=1)(jnp.array(w), "DF"),
    ):
        assert np.asarray(scale).tolist() == [0, 0, np.float32(2) * np.float32(1 / 127)]
        assert np.asarray(values).T.tolist() == [[0] * 4, [0] * 4, [63, -127, 32, 0]]


def test_the_tree_is_that_of_a_model_of_this_configuration(both):
    config, model, new_config, new = both
    assert new_config == replace(config, quantized="int8")
    with jax.set_mesh(one_device_mesh()):
        wanted = abstract_model(new_config)
    assert jax.tree.structure(new) == jax.tree.structure(wanted)
    for leaf, like in zip(jax.tree.leaves(new), jax.tree.leaves(wanted), strict=True):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
    assert new.norm[...] is model.norm[...]
    assert isinstance(model.layers.wq, nnx.Param), "the model itself is left as it was"


@pytest.mark.parametrize("blocks", ["whole", "blocks"])
def test_products_are_those_of_the_numbers_that_int8_stands_for(both, blocks, monkeypatch):
    config, model, new_config, new = both
    monkeypatch.setattr(linear, "FEW_ROWS", 64 if blocks == "blocks" else 0)
    # Sides have 4 to 40 numbers: a matrix has several blocks.
    monkeypatch.setattr(linear_cpu, "_BLOCK", 512)
    like = jax.tree.map(lambda leaf: leaf, model)
    for node, name in [(like, "tok_embeddings"), (like, "output"), *matrices(like.layers)]:
        kept = getattr(new if node is like else new.layers, name)
        if isinstance(kept, Int8Matrix):
            values, scale = np.asarray(kept.values[...]), np.asarray(kept.scale[...])
            dims = {"wq": "DNH", "wk": "DKH", "wv": "DKH", "wo": "NHD", "w2": "FD"}.get(name, "DF")
            float64 = expanded(values, scale, "VD" if name == "tok_embeddings" else dims)
            getattr(node, name)[...] = jnp.asarray(float64.astype(np.float32))
    with jax.set_mesh(one_device_mesh()):
        expected = full(config, like, TOKENS)
        logits = jax.jit(lambda model: forward(new_config, model, TOKENS))(new)
    # Logits of deviation 1, in float32, after 15 products in a row; measured 2e-6.
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def matrices(layers):
    return [(layers, name) for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")]


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 2, 4)])
def test_every_mesh_gives_the_values_and_logits_of_one_device(both, shape):
    config, model, new_config, new = both
    with jax.set_mesh(one_device_mesh()):
        expected = full(new_config, new, TOKENS)
    with jax.set_mesh(mesh_of(shape)):
        there = jax.device_put(model, jax.tree.map(lambda a: a.sharding, abstract_model(config)))
        _, split = quantize_model(config, there)
        for leaf, like in zip(
            jax.tree.leaves(split), jax.tree.leaves(abstract_model(new_config)), strict=True
        ):
            assert leaf.sharding == like.sharding
        assert tree_equal(split, new)
        logits = full(new_config, split, TOKENS)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_stories260k_hardly_changes(shared_data):
    folder = shared_data / "stories260K"
    reference = json.loads((folder / "stories260K_reference.json").read_text())
    ids = np.load(folder / "stories260K_reference.npz")["text_ids"][None].astype(np.int32)
    with jax.set_mesh(one_device_mesh()):
        config, model = load_reference(folder / "hf")
        expected = np.asarray(full(config, model, ids)[0])
        new_config, new = quantize_model(config, model)
        w1, kept = np.asarray(model.layers.w1[...]), new.layers.w1
        off = w1 - expanded(np.asarray(kept.values[...]), np.asarray(kept.scale[...]), "DF")
        # A step is 1/127 of a channel's largest of 64 numbers, about 2.6 deviations; an even error
        # within a step deviates by 1/√12 of it: 2.6 / 127 / √12 = 0.6 %.
        assert 0.005 < np.std(off) / np.std(w1) < 0.007
        # Each product is off by that, independently of the others, whose sum the logits are: about
        # as much, and a little more for what goes through two or three in a row. Measured 0.87 %.
        logits = np.asarray(full(new_config, new, ids)[0])
        assert 0.005 < np.std(logits - expected) / np.std(expected) < 0.012
        assert np.mean(logits.argmax(-1) == expected.argmax(-1)) > 0.95
        prompt, greedy = (reference["prompts"][0][key] for key in ("ids", "greedy_ids"))
        # The first token that another one overtakes is the 58th.
        assert list(stream(new_config, new, prompt, max_new_tokens=48)) == greedy[:48]


def test_what_is_quantized_already_is_refused(both):
    *_, new_config, new = both
    with pytest.raises(
        InputError, match="is already quantized to int8: quantize the original instead"
    ):
        quantize_model(new_config, new)
