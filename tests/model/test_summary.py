"""The repr of a model, as notebooks show it."""

import jax
from conftest import mesh_of, tiny_model

from llama_jax.model.weights import Llama, quantize_model, unstack_layers


def test_the_repr_has_a_line_for_each_weight():
    config = tiny_model()
    with jax.set_mesh(mesh_of((1, 2, 2))):
        model = jax.jit(Llama, static_argnums=0)(config, jax.random.key(0))
        stacked = repr(model)
        traced = []
        jax.jit(lambda m: traced.append(repr(m)))(model)
        quantized = repr(quantize_model(config, model)[1].layers.w1)
        unstacked = repr(unstack_layers(model))
    assert [" ".join(line.split()) for line in stacked.splitlines()[:4]] == [
        "Llama: 45,216 parameters",
        "layers.attention_norm float32[2, 32] P(None, 'fsdp')",
        "layers.ffn_norm float32[2, 32] P(None, 'fsdp')",
        "layers.w1 float32[2, 32, 64] P(None, 'fsdp', 'tensor')",
    ]
    assert len(stacked.splitlines()) == 13
    assert traced[0].startswith("Llama: 45,216 parameters\n")
    assert quantized.splitlines()[0] == "Int8Matrix: 4,224 parameters"
    assert "layers.w1 2 × float32[64, 32] P('tensor', 'fsdp')" in " ".join(unstacked.split())
    assert len(unstacked.splitlines()) == 13
