"""Each part of a step has its name in the compiled program, and therefore in a profile."""

import re
from functools import partial

import jax
import jax.numpy as jnp
from conftest import mesh_of, tiny_config, tiny_model

from llama_jax.checkpoint.tree import abstract_model, eval_shape_on_mesh
from llama_jax.data.windows import Batch
from llama_jax.model.transformer import forward
from llama_jax.training.step import init_state, train_step

LAYER = {"attention_norm", "attention", "ffn_norm", "feed_forward"}
TOKENS = jax.ShapeDtypeStruct((8, 16), jnp.int32)


def scopes(lowered: jax.stages.Lowered, *, backward: bool = False) -> set[str]:
    """Returns the parts of `op_name` of all operations in the compiled program.

    Args:
        lowered: the program.
        backward: the operations of the backward pass, instead of all others.
    """
    text = lowered.compile().as_text()
    named = [op for op in re.findall(r'op_name="([^"]*)"', text) if " " not in op]
    selected = [op for op in named if ("transpose(jvp" in op) == backward]
    return {part for op in selected for part in re.split(r"[/()]", op)}


def test_a_compiled_step_names_its_parts():
    config = tiny_config(tiny_model(remat="full"))
    with jax.set_mesh(mesh_of((2, 2, 2))):
        state = eval_shape_on_mesh(partial(init_state, config), jax.random.key(0))
        batch = Batch(*(jax.ShapeDtypeStruct((1, 8, 16), jnp.int32) for _ in range(4)))
        step = train_step.lower(config, *state, batch, jax.ShapeDtypeStruct((), jnp.int32))
    parts = LAYER | {"tok_embeddings", "norm"}
    assert scopes(step) >= parts | {"loss", "optimizer"}
    assert (
        scopes(step, backward=True) >= parts
    )  # the gradient of the loss is computed in the forward pass


def test_a_compiled_forward_pass_names_its_parts():
    config = tiny_model()
    with jax.set_mesh(mesh_of((1, 1, 1))):
        lowered = jax.jit(partial(forward, config)).lower(abstract_model(config), TOKENS)
    assert scopes(lowered) >= LAYER | {"tok_embeddings", "norm", "output"}
