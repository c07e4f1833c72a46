"""The cross-entropy of each token, whose gradient may weight each token differently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import textbook
from conftest import mesh_of, tiny_config
from test_gradients import B, T, V, assert_close, leaves, random_batch, random_model, small_model

from llama_jax.checkpoint.tree import abstract_model
from llama_jax.data.windows import Batch
from llama_jax.parallel.collectives import shard_sequence
from llama_jax.parallel.mesh import one_device_mesh, shard_array
from llama_jax.training import loss as loss_module
from llama_jax.training.loss import token_losses

BATCH = random_batch(packed=True)


def objective(nll_BT, xp=jnp):
    """A function of the losses in which tokens have different weights."""
    return xp.sum(xp.sin(nll_BT) * nll_BT)


@pytest.fixture(scope="module")
def expected():
    """Loss of each token and gradient of the objective, from the textbook in float64, by head."""
    results = {}
    for tied in (False, True):
        with jax.set_mesh(one_device_mesh()):
            weights = leaves(random_model(small_model(tied_head=tied)))

        def losses(w):
            logprob, _ = textbook.logprobs(w, *BATCH)
            nll_BT = jnp.where(BATCH.targets >= 0, -logprob, 0)
            return objective(nll_BT), nll_BT

        with jax.enable_x64(True):
            gradient = jax.grad(losses, has_aux=True)
            grads, nll_BT = jax.jit(gradient)(weights)
            results[tied] = np.asarray(nll_BT), {k: np.asarray(g) for k, g in grads.items()}
    return results


def test_the_logits_are_never_materialized_at_once(monkeypatch, one_device):
    B, T, V = 32, 64, 16_384
    config = tiny_config(small_model(vocab_size=V, n_layers=1)).model

    def losses(model, batch):
        return objective(token_losses(config, model, jax.tree.map(shard_sequence, batch)))

    def temporaries(chunk_bytes):
        monkeypatch.setattr(loss_module, "CHUNK_BYTES", chunk_bytes)
        batch = Batch(*(jax.ShapeDtypeStruct((B, T), jnp.int32) for _ in range(4)))
        gradient = jax.jit(jax.grad(lambda model, batch: losses(model, batch)))
        program = gradient.lower(abstract_model(config), batch).compile()
        return program.memory_analysis().temp_size_in_bytes

    logits = 4 * B * T * V
    assert temporaries(1 << 40) > logits
    assert temporaries(1 << 20) < 0.5 * logits


# Mesh (data, fsdp, tensor, context), tied head, size of a chunk [tokens]; T is 40.
CASES = [((1, 1, 1, 1), True, 64), ((2, 2, 2, 1), True, 16), ((1, 2, 1, 4), False, 4)]


@pytest.mark.parametrize(("mesh", "tied", "chunk"), CASES)
def test_losses_of_tokens_and_their_gradient_are_those_of_the_textbook(
    expected, monkeypatch, mesh, tied, chunk
):
    nll_BT, grads = expected[tied]
    data, fsdp, tensor, _ = mesh
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * B // (data * fsdp) * V // tensor * chunk)
    config = tiny_config(small_model(tied_head=tied)).model

    def losses(model, batch):
        nll_BT = token_losses(config, model, jax.tree.map(shard_sequence, batch))
        return objective(nll_BT), nll_BT

    with jax.set_mesh(mesh_of(mesh)):
        program = jax.jit(jax.grad(losses, has_aux=True))
        batch = Batch(*(shard_array(field, "BT") for field in BATCH))
        found, found_nll_BT = program(random_model(config), batch)
        order = np.asarray(shard_sequence(jnp.tile(jnp.arange(T), (B, 1))))[0]
    assert_close(leaves(found), grads)
    np.testing.assert_allclose(found_nll_BT, nll_BT[:, order], rtol=1e-5, atol=1e-6)
