from dataclasses import fields, replace

import pytest
from conftest import tiny_model
from pydantic import TypeAdapter

from llama_jax.config.model import Architecture, ComputeConfig, ModelConfig, RopeScaling

# A valid value of each field that differs from tiny_model's.
OTHER_VALUES = {
    "dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 8, "head_dim": 16, "hidden_dim": 32,
    "vocab_size": 321, "context": 32, "norm_eps": 1e-6, "rope_theta": 5e5,
    "rope_scaling": RopeScaling(), "tied_head": True, "quantized": "int8", "dtype": "bfloat16",
    "param_dtype": "bfloat16", "cache_dtype": "int8", "reduce_dtype": "bfloat16",
    "attention": "xla", "remat": "full", "scan": False,
}  # fmt: skip


def names(cls):
    return [field.name for field in fields(cls)]


def test_each_field_belongs_to_the_architecture_or_to_the_computation():
    assert not set(names(Architecture)) & set(names(ComputeConfig))
    assert names(ModelConfig) == names(Architecture) + names(ComputeConfig)


@pytest.mark.parametrize("name", names(ModelConfig))
def test_models_differ_in_the_fields_of_the_architecture_only(name):
    model = tiny_model()
    changed = replace(model, **{name: OTHER_VALUES[name]})
    assert changed != model
    expected = [name] if name in names(Architecture) else []
    assert model.differences(changed) == changed.differences(model) == expected


def test_a_model_survives_json_and_has_a_hash():
    model = tiny_model(rope_scaling=RopeScaling(factor=32.0), quantized="int8")
    adapter = TypeAdapter(ModelConfig)
    again = adapter.validate_json(adapter.dump_json(model))
    assert (again, hash(again)) == (model, hash(model))
