"""LoRA: gradients of the pairs against a textbook in float64; no others are computed or stored."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, tiny_config
from flax import nnx
from test_gradients import (
    DATA_FSDP_TENSOR,
    FSDP_CONTEXT,
    ONE,
    B,
    assert_close,
    case_id,
    leaves,
    random_batch,
    random_model,
    shard_batch,
    small_model,
    textbook_gradient,
)

from llama_jax.config.lora import LoraConfig
from llama_jax.data.windows import Batch
from llama_jax.model.linear import matmul
from llama_jax.model.lora import Adapted, LowRank, low_rank_dims
from llama_jax.model.quantize import MATRIX_DIMS
from llama_jax.model.weights import quantize_model
from llama_jax.parallel.mesh import one_device_mesh, shard_array
from llama_jax.training.optimizer import adamw
from llama_jax.training.step import eval_step, gradients, init_state, train_step

LORA = LoraConfig(rank=4, alpha=6.0)


def lora_config(model=None, lora=LORA, **training):
    config = tiny_config(init_from="base", **training)
    return replace(config, model=model or small_model(), lora=lora)


def trained_pairs(config):
    """Returns pairs on the current mesh in which b is not zero."""
    adapters, _ = init_state(config, jax.random.key(3))
    rng = np.random.default_rng(2)
    for name in config.lora.targets:
        b = getattr(adapters.layers, name).b
        numbers = 0.1 * rng.standard_normal(b.shape, np.float32)
        b[...] = jax.device_put(numbers, b[...].sharding)
    return adapters


def base_model(config):
    """Returns the frozen weights on the current mesh, in the storage of the configuration."""
    model = random_model(replace(config.model, quantized="none"))
    if config.model.quantized == "int8":
        _, model = quantize_model(replace(config.model, quantized="none"), model)
    return model


def dequantized(weights):
    """Returns the weights by name in float64, with int8 values multiplied by their scales."""
    result = {}
    for name, values in weights.items():
        matrix = name.removesuffix(".values")
        if f"{matrix}.scale" in weights and name != matrix:
            scale = weights[f"{matrix}.scale"]
            dims = {"tok_embeddings": "VD", "output": "DV"}.get(
                matrix, f"L{MATRIX_DIMS.get(matrix.rpartition('.')[2])}"
            )
            out = "V" if "V" in dims else "L" + low_rank_dims(dims[1:])[1][1:]
            result[matrix] = np.einsum(f"{dims},{out}->{dims}", values, scale)
        elif not name.endswith(".scale"):
            result[name] = values
    return result


@functools.cache
def expected_gradient(kv_heads, tied, packed, z_loss, quantized):
    """Returns the gradient of each pair and the loss, from the textbook's of the merged weights.

    With W + sAB in place of W: dA = s dW Bᵀ and dB = s Aᵀ dW.
    """
    model = small_model(n_kv_heads=kv_heads, tied_head=tied, quantized=quantized)
    config = lora_config(model)
    with jax.set_mesh(one_device_mesh()):
        weights, pairs = dequantized(leaves(base_model(config))), leaves(trained_pairs(config))
    equations = {}
    for name, dims in MATRIX_DIMS.items():
        a_dims, b_dims = low_rank_dims(dims)
        equations[name] = f"L{a_dims}", f"L{b_dims}", f"L{dims}"
    for name, (a_dims, b_dims, dims) in equations.items():
        a, b = pairs[f"layers.{name}.a"], pairs[f"layers.{name}.b"]
        product = np.einsum(f"{a_dims},{b_dims}->{dims}", a, b)
        weights[f"layers.{name}"] = weights[f"layers.{name}"] + LORA.scale * product
    grads, loss = textbook_gradient(weights, random_batch(packed), z_loss)
    expected = {}
    for name, (a_dims, b_dims, dims) in equations.items():
        dw = grads[f"layers.{name}"]
        a, b = pairs[f"layers.{name}.a"], pairs[f"layers.{name}.b"]
        expected[f"layers.{name}.a"] = LORA.scale * np.einsum(f"{dims},{b_dims}->{a_dims}", dw, b)
        expected[f"layers.{name}.b"] = LORA.scale * np.einsum(f"{dims},{a_dims}->{b_dims}", dw, a)
    return expected, loss


# Rematerialization, mesh, micro-batches, key/value heads, tied, packed, z-loss, storage.
CASES = [
    ("none", ONE, 1, 2, False, True, 1e-3, "none"),
    ("full", ONE, 4, 4, True, False, 0.0, "int8"),
    ("full", DATA_FSDP_TENSOR, 1, 2, False, True, 1e-3, "none"),
    ("products", DATA_FSDP_TENSOR, 2, 2, True, True, 0.0, "int8"),
    ("attention", FSDP_CONTEXT, 4, 4, False, True, 0.0, "int8"),
    ("none", FSDP_CONTEXT, 1, 2, True, False, 1e-3, "none"),
]


@functools.partial(jax.jit, static_argnums=0)
def pair_gradients(config, adapters, batch, base, step=None):
    return gradients(config, adapters, batch, base, step)[:3]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_gradient_of_the_pairs_is_that_of_the_textbook_in_float64(case):
    remat, mesh, micro_batches, kv_heads, tied, packed, z_loss, quantized = case
    expected, loss = expected_gradient(kv_heads, tied, packed, z_loss, quantized)
    model = small_model(remat=remat, n_kv_heads=kv_heads, tied_head=tied, quantized=quantized)
    config = lora_config(model, micro_batches=micro_batches, z_loss=z_loss)
    with jax.set_mesh(mesh_of(mesh)):
        batch = shard_batch(random_batch(packed), micro_batches, packed)
        grads, found, _ = pair_gradients(config, trained_pairs(config), batch, base_model(config))
    assert_close(leaves(grads), expected)
    assert float(found) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("quantized", ["none", "int8"])
@pytest.mark.parametrize("mesh", [ONE, DATA_FSDP_TENSOR], ids=case_id)
def test_the_first_step_has_the_loss_of_the_base_bit_for_bit(mesh, quantized):
    config = lora_config(small_model(quantized=quantized), micro_batches=2)
    with jax.set_mesh(mesh_of(mesh)):
        base = base_model(config)
        adapters, opt_state = init_state(config, jax.random.key(3))
        batch = shard_batch(random_batch(True), 2, packed=True)
        expected = eval_step(config, base, batch)
        assert eval_step(config, adapters, batch, base) == expected
        _, _, metrics = train_step(config, adapters, opt_state, batch, jnp.int32(0), base)
    nll, targets = expected
    assert float(metrics.loss) == float(nll * (1 / targets))


def test_packed_examples_have_the_loss_and_gradient_of_unpacked_ones():
    """Four examples in two windows, with a segment of padding; and each in a window of its own."""
    rng = np.random.default_rng(5)
    lengths = [11, 9, 14, 5]
    examples = [rng.integers(0, 160, n + 1).astype(np.int32) for n in lengths]
    trained = [rng.random(n) < 0.5 for n in lengths]

    def rows(windows):
        batch = Batch(*(np.zeros((len(windows), 24), np.int32) for _ in range(4)))
        batch.targets[...] = -1
        for row, window in enumerate(windows):
            at = 0
            for segment, i in enumerate(window, 1):
                part = slice(at, at + lengths[i])
                batch.tokens[row, part] = examples[i][:-1]
                batch.targets[row, part] = np.where(trained[i], examples[i][1:], -1)
                batch.positions[row, part] = np.arange(lengths[i])
                batch.segments[row, part] = segment
                at += lengths[i]
            batch.segments[row, at:] = len(window) + 1
            batch.positions[row, at:] = np.arange(24 - at)
        return batch

    config = lora_config()
    with jax.set_mesh(one_device_mesh()):
        adapters, base = trained_pairs(config), base_model(config)
        results = []
        for windows in ([[0, 1], [2, 3]], [[0], [1], [2], [3]]):
            batch = shard_batch(rows(windows), 1, packed=True)
            results.append(pair_gradients(config, adapters, batch, base))
    (packed, loss, targets), (unpacked, expected, counted) = results
    assert int(targets) == int(counted) == sum(map(np.sum, trained))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert_close(leaves(packed), leaves(unpacked), 1e-5)


def dots(text):
    """Returns the shapes of the results of all matrix products in a compiled program."""
    found = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
    return {tuple(sorted(map(int, shape.split(",")))) for shape in found}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_gradient_of_the_base_is_computed_or_stored(remat):
    """No product of the compiled step has the shape of a matrix, and no argument is copied."""
    model = small_model(hidden_dim=44, vocab_size=168, remat=remat)
    lora = replace(LORA, rank=3)
    shapes = {(32, 44), (32, 168)}  # of w1, w2, w3 and of the head: no activation has them
    programs = []
    for config in (tiny_config(model), lora_config(model, lora)):
        with jax.set_mesh(one_device_mesh()):
            trained, opt_state = jax.eval_shape(
                functools.partial(init_state, config), jax.random.key(0)
            )
            base = random_model(model) if config.lora else None
            batch = shard_batch(random_batch(True), 1, packed=True)
            program = train_step.lower(config, trained, opt_state, batch, jnp.int32(0), base)
            programs.append(program.compile())
    full, ours = (program.as_text() for program in programs)
    assert dots(full) >= shapes
    assert not dots(ours) & shapes
    assert {(3, 32), (3, 44)} <= dots(ours)
    aliased = [program.memory_analysis().alias_size_in_bytes for program in programs]
    n_params = model.n_params, lora.n_params(model)
    assert aliased == [3 * 4 * n + 4 for n in n_params]  # trained weights, moments, step counter


def dropped_ones(p, shape, key):
    """Returns ones [B, T, D] after dropout: W is zero, A and B are the identity."""
    D = shape[-1]
    w = nnx.Param(jnp.zeros((D, D)))
    lora = LoraConfig(rank=D, alpha=D, dropout=p)
    adapted = Adapted(w, LowRank(jnp.eye(D), jnp.eye(D)), lora, key)
    ones = shard_array(np.ones(shape, np.float32), "BTD")
    return np.asarray(matmul(small_model(), "BTD,DF->BTF", ones, adapted))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_each_element_with_its_probability_and_scales_the_others(p):
    shape = 16, 64, 32
    with jax.set_mesh(one_device_mesh()):
        masks = [dropped_ones(p, shape, jax.random.key(i)) for i in (0, 1)]
    dropped = [mask == 0 for mask in masks]
    for mask, zero in zip(masks, dropped, strict=True):
        np.testing.assert_allclose(mask[~zero], 1 / (1 - p), rtol=1e-6)
        # Five standard errors: of all elements, and of each token, row and feature.
        for axes in ((0, 1, 2), (0,), (1,), (2,), (0, 1), (1, 2)):
            n = np.prod([shape[axis] for axis in axes])
            assert np.abs(zero.mean(axis=axes) - p).max() < 5.5 * (p * (1 - p) / n) ** 0.5 + 1 / n
    both = np.mean(dropped[0] & dropped[1])  # independent of each other
    assert both == pytest.approx(p * p, abs=5 * p / np.size(dropped[0]) ** 0.5)


def test_dropout_is_a_function_of_seed_step_layer_matrix_and_micro_batch():
    lora = replace(LORA, dropout=0.2)
    config = lora_config(lora=lora, micro_batches=2)
    # Equal micro-batches: without dropout their gradients are equal.
    half = random_batch(True, rows=B // 2)
    batch = Batch(*(np.concatenate([field, field]) for field in half))
    results = {}
    for mesh in (ONE, DATA_FSDP_TENSOR, FSDP_CONTEXT):
        with jax.set_mesh(mesh_of(mesh)):
            adapters, base = trained_pairs(config), base_model(config)
            sharded = shard_batch(batch, 2, packed=True)
            for step in (0, 1):
                grads, _, _ = pair_gradients(config, adapters, sharded, base, jnp.int32(step))
                results[mesh, step] = leaves(grads)
    assert_close(results[DATA_FSDP_TENSOR, 0], results[ONE, 0], 1e-5)
    assert_close(results[FSDP_CONTEXT, 0], results[ONE, 0], 1e-5)
    with jax.set_mesh(one_device_mesh()):
        adapters, base = trained_pairs(config), base_model(config)
        sharded = shard_batch(batch, 2, packed=True)
        again, _, _ = pair_gradients(config, adapters, sharded, base, jnp.int32(1))
        other = replace(config, lora=replace(lora, seed=1))
        reseeded, _, _ = pair_gradients(other, adapters, sharded, base, jnp.int32(1))
        first = shard_batch(half, 1, packed=True)
        one = replace(config, training=replace(config.training, micro_batches=1))
        of_first, _, _ = pair_gradients(one, adapters, first, base, jnp.int32(1))
        validated = eval_step(config, adapters, sharded, base)
        assert validated == eval_step(replace(config, lora=LORA), adapters, sharded, base)
    for name, grad in leaves(again).items():
        np.testing.assert_array_equal(grad, results[ONE, 1][name])
        for different in (results[ONE, 0][name], leaves(reseeded)[name], leaves(of_first)[name]):
            assert np.abs(grad - different).max() > 1e-3 * np.abs(grad).max(), name


@pytest.mark.slow
def test_each_mesh_gives_the_losses_of_one_device():
    config = replace(lora_config(lora=replace(LORA, dropout=0.1)), model=small_model(n_kv_heads=4))
    losses = {}
    for mesh in (ONE, DATA_FSDP_TENSOR, FSDP_CONTEXT):  # each axis beside others
        with jax.set_mesh(mesh_of(mesh)):
            base, adapters = base_model(config), trained_pairs(config)
            opt_state = jax.jit(adamw(config.optimizer).init)(adapters)
            batch = shard_batch(random_batch(True), 1, packed=True)
            losses[mesh] = []
            for step in range(20):
                adapters, opt_state, metrics = train_step(
                    config, adapters, opt_state, batch, jnp.int32(step), base
                )
                losses[mesh].append(float(metrics.loss))
    assert losses[ONE][-1] < losses[ONE][0] - 0.5
    for found in losses.values():
        np.testing.assert_allclose(found, losses[ONE], rtol=1e-5)
