"""The training step: equal on each mesh and in any number of chunks, and safe from NaN."""

import copy
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import MESHES, mesh_of, tiny_config, tiny_model

from llama_jax.checkpoint.tree import abstract_model, eval_shape_on_mesh
from llama_jax.config.lora import LoraConfig
from llama_jax.data.windows import Batch
from llama_jax.model.transformer import forward
from llama_jax.parallel.mesh import one_device_mesh, shard_array
from llama_jax.training import layer_norms
from llama_jax.training import loss as loss_module
from llama_jax.training.step import StepMetrics, eval_step, gradients, init_state, train_step

CONFIG = tiny_config(z_loss=1e-3)
gradients = jax.jit(gradients, static_argnums=0)
B, T = 8, 16


def make_batch():
    """Returns packed documents, with most targets of the first rows masked."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.model.vocab_size, (B, T + 1)).astype(np.int32)
    lengths = np.array([[5, 4, 7], [16, 0, 0], [1, 1, 14], [8, 8, 0]] * 2)
    segments = np.stack([np.repeat([1, 2, 3], row) for row in lengths]).astype(np.int32)
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    targets = tokens[:, 1:].copy()
    targets[:3, 2:] = -1
    return Batch(tokens[:, :-1], targets, positions.astype(np.int32), segments)


BATCH = make_batch()


def shard_batch(micro_batches=1):
    shape = (micro_batches, B // micro_batches, T)
    return Batch(*(shard_array(field.reshape(shape), "ABT") for field in BATCH))


@pytest.fixture(scope="module")
def one_device_result():
    """Weights and optimizer state, and the gradients of the batch on one device."""
    with jax.set_mesh(one_device_mesh()):
        state = init_state(CONFIG, jax.random.key(1))
        return state, gradients(CONFIG, state[0], shard_batch())


def on_this_mesh(state):
    """Returns a copy of `state`, which a step may donate, on the current mesh."""
    targets = eval_shape_on_mesh(partial(init_state, CONFIG), jax.random.key(0))
    copy = jax.tree.map(np.array, state)
    return jax.device_put(copy, jax.tree.map(lambda leaf: leaf.sharding, targets))


def assert_close(ours, theirs, tolerance=1e-5):
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(np.abs(b).max())))


def test_loss_is_the_mean_over_counted_targets(one_device_result):
    (model, _), (_, loss, targets, _, sums) = one_device_result
    with jax.set_mesh(one_device_mesh()):
        logits = jax.jit(forward, static_argnums=0)(
            CONFIG.model, model, *BATCH._replace(targets=BATCH.positions)[:1], *BATCH[2:]
        )
        nll, counted = eval_step(CONFIG, model, shard_batch())
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows, columns = np.nonzero(BATCH.targets >= 0)
    expected = -log_p[rows, columns, BATCH.targets[rows, columns]]
    assert int(targets) == int(counted) == len(expected) == 5 * 16 + 3 * 2
    assert float(loss) == pytest.approx(expected.mean(), rel=1e-6)
    assert float(nll) == pytest.approx(expected.sum(), rel=1e-6)
    of_rows = np.bincount(rows, expected, minlength=B)
    np.testing.assert_allclose(sums.nll, [of_rows], rtol=1e-6)
    np.testing.assert_array_equal(sums.targets, [np.bincount(rows, minlength=B)])


def test_z_loss_is_in_the_gradient_but_not_in_the_loss(one_device_result):
    (model, _), (grads, loss, *_) = one_device_result
    config = tiny_config(z_loss=0.0)
    with jax.set_mesh(one_device_mesh()):
        plain, same_loss, *_ = gradients(config, model, shard_batch())

        def penalty(model):
            logits = forward(CONFIG.model, model, BATCH.tokens, *BATCH[2:])
            log_z = jax.nn.logsumexp(logits, -1)
            return 1e-3 * jnp.sum(jnp.where(BATCH.targets >= 0, log_z**2, 0)) / 86

        expected = jax.jit(jax.grad(penalty))(model)
    assert float(same_loss) == pytest.approx(float(loss), rel=1e-6)
    assert_close(jax.tree.map(jnp.subtract, grads, plain), expected, 1e-6)


@pytest.mark.parametrize("mesh", [*MESHES[1:], (2, 1, 2, 2)])
def test_loss_and_gradients_agree_on_every_mesh(one_device_result, mesh):
    state, expected = one_device_result
    with jax.set_mesh(mesh_of(mesh)):
        model, _ = on_this_mesh(state)
        assert_close(gradients(CONFIG, model, shard_batch()), expected)


# Each three of the axes together (data, fsdp, tensor, context), and the two that no mesh of
# `test_loss_and_gradients_agree_on_every_mesh` has alone.
MESHES_BY_AXIS = [
    (2, 2, 2, 1),
    (2, 2, 1, 2),
    (2, 1, 2, 2),
    (1, 2, 2, 2),
    (1, 1, 4, 1),
    (1, 1, 1, 8),
]


@pytest.fixture(scope="module")
def one_device_losses(one_device_result):
    return losses_of_20_steps(one_device_result[0], (1, 1, 1, 1))


def losses_of_20_steps(state, mesh):
    losses = []
    with jax.set_mesh(mesh_of(mesh)):
        model, opt_state = on_this_mesh(state)
        batch = shard_batch()
        for step in range(20):
            model, opt_state, metrics = train_step(CONFIG, model, opt_state, batch, jnp.int32(step))
            losses.append(float(metrics.loss))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES_BY_AXIS)
def test_each_mesh_gives_the_losses_of_one_device(one_device_result, one_device_losses, mesh):
    assert one_device_losses[-1] < 0.5 * one_device_losses[0]  # it fits the batch
    np.testing.assert_allclose(
        losses_of_20_steps(one_device_result[0], mesh), one_device_losses, rtol=1e-5
    )


def test_the_logits_of_a_batch_are_never_materialized_at_once(monkeypatch):
    B, T, V = 32, 64, 16_384
    config = tiny_config(tiny_model(vocab_size=V))

    def temporaries(chunk_bytes):
        monkeypatch.setattr(loss_module, "CHUNK_BYTES", chunk_bytes)
        with jax.set_mesh(one_device_mesh()):
            model, _ = eval_shape_on_mesh(partial(init_state, config), jax.random.key(0))
            batch = Batch(*(jax.ShapeDtypeStruct((1, B, T), jnp.int32) for _ in range(4)))
            program = jax.jit(lambda model, batch: gradients.__wrapped__(config, model, batch))
            return program.lower(model, batch).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * B * T * V
    assert temporaries(1 << 40) > logits
    assert temporaries(1 << 20) < 0.5 * logits


def test_bfloat16_trains_too(one_device_result):
    """The loss falls as in float32, within bfloat16's 8 bits."""
    config = tiny_config(tiny_model(dtype="bfloat16", reduce_dtype="bfloat16"))
    with jax.set_mesh(mesh_of((2, 2, 2))):
        model, opt_state = on_this_mesh(one_device_result[0])
        losses = []
        for step in range(5):
            model, opt_state, metrics = train_step(
                config, model, opt_state, shard_batch(), jnp.int32(step)
            )
            losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(float(one_device_result[1].loss), rel=2**-7)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_a_step_is_that_of_adamw(one_device_result, mesh):
    state, (grads, loss, *_) = one_device_result
    with jax.set_mesh(mesh_of(mesh)):
        model, opt_state = on_this_mesh(state)
        new_model, new_state, metrics = train_step(
            CONFIG, model, opt_state, shard_batch(), jnp.int32(0)
        )
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    rate = 1e-2 / 2  # the first of two warm-up steps
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-5)
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-6)
    assert float(metrics.learning_rate) == pytest.approx(rate)
    assert norm > 1  # so that clipping has an effect

    def expected(path, weight, grad):
        weight, g = np.asarray(weight), np.asarray(grad, np.float64) / norm
        m, v = 0.1 * g / (1 - 0.9), 0.05 * g**2 / (1 - 0.95)
        decay = 0 if "norm" in jax.tree_util.keystr(path) else 0.1
        return weight - rate * (m / (np.sqrt(v) + 1e-8) + decay * weight)

    expected_model = jax.tree.map_with_path(expected, state[0], grads)
    for a, b, g in zip(*map(jax.tree.leaves, (new_model, expected_model, grads)), strict=True):
        # Where a gradient is nearly zero, rounding decides the sign of Adam's first update.
        large = np.abs(np.asarray(g)) > 1e-6
        np.testing.assert_allclose(np.asarray(a)[large], b[large], atol=1e-5)
    assert int(new_state[0].count) == 1


def test_a_gradient_that_is_not_finite_changes_no_weights(one_device_result):
    state, _ = one_device_result
    with jax.set_mesh(one_device_mesh()):
        model, opt_state = on_this_mesh(state)
        broken = np.array(model.layers.w2[...])
        broken[0, 0, 0] = np.inf
        model.layers.w2[...] = jax.device_put(broken, model.layers.w2.sharding)
        before = [np.array(x) for x in jax.tree.leaves((model, opt_state))]
        model, opt_state, metrics = train_step(
            CONFIG, model, opt_state, shard_batch(), jnp.int32(3)
        )
    assert bool(metrics.skipped)
    assert not np.isfinite(metrics.grad_norm)
    for a, b in zip(jax.tree.leaves((model, opt_state)), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_batch_without_counted_targets_is_a_finite_step(one_device_result):
    state, _ = one_device_result
    with jax.set_mesh(one_device_mesh()):
        model, opt_state = on_this_mesh(state)
        batch = shard_batch()._replace(targets=shard_batch().targets * 0 - 1)
        _, _, metrics = train_step(CONFIG, model, opt_state, batch, jnp.int32(0))
    assert (float(metrics.loss), int(metrics.targets), bool(metrics.skipped)) == (0.0, 0, False)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_optimizer_state_inherits_the_shardings_of_its_weights(remat):
    config = tiny_config(tiny_model(remat=remat))
    with jax.set_mesh(mesh_of((2, 2, 2))):
        model, opt_state = eval_shape_on_mesh(partial(init_state, config), jax.random.key(0))
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(model)]
    for moments in (opt_state[0].mu, opt_state[0].nu):
        assert [leaf.sharding.spec for leaf in jax.tree.leaves(moments)] == specs
    assert StepMetrics._fields[0] == "loss"
    assert isinstance(opt_state[0], optax.ScaleByAdamState)


class Section:
    """A section of a configuration of which only some fields may be read."""

    def __init__(self, section, *names):
        vars(self).update({name: getattr(section, name) for name in names})

    def __getattr__(self, name):
        raise AssertionError(f"a compiled program reads the field {name}")


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, alpha=4.0, dropout=0.1)])
@pytest.mark.parametrize("objective", ["next_token", "dpo"])
def test_compiled_programs_read_only_the_fields_that_their_configuration_retains(objective, lora):
    config = tiny_config(objective=objective, init_from="model", micro_batches=2)
    config = dataclasses.replace(config, lora=lora)
    others = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, mixture={"elsewhere": 1.0}, seed=1),
        training=dataclasses.replace(config.training, out="elsewhere", seed=1, eval_every=7),
    )
    assert config != others
    assert config.program == others.program
    guarded = copy.copy(config.program)
    for name in ("mesh", "data", "checkpoint", "logging"):
        object.__setattr__(guarded, name, Section(None))
    names = "steps", "micro_batches", "objective", "dpo_beta", "dpo_sft_weight", "z_loss"
    object.__setattr__(guarded, "training", Section(config.program.training, *names))
    with jax.set_mesh(mesh_of((2, 2, 2))):
        trained, opt_state = eval_shape_on_mesh(partial(init_state, guarded), jax.random.key(0))
        batch = shard_batch(2)
        base = abstract_model(config.model) if config.has_base else None
        train_step.trace(guarded, trained, opt_state, batch, jnp.int32(0), base)
        eval_step.trace(guarded, trained, batch, base)
        layer_norms.compute_norms.trace(guarded, trained, batch, jnp.int32(0), base)
