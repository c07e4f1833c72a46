"""PEFT folders: the tensors and settings that are written and read, and those that are refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from conftest import tiny_model
from lora_runs import random_pairs
from sample_checkpoints import read_tensors
from tensor_files import write_tensors

from llama_jax.config.lora import IN_OUT_DIMS, LoraConfig
from llama_jax.convert.formats import huggingface, peft
from llama_jax.convert.layout import AXES, Layout, Weight
from llama_jax.convert.merge import merge_pair
from llama_jax.errors import InputError

MODEL = tiny_model(n_heads=8, n_kv_heads=2)
LORAS = [
    LoraConfig(rank=4, alpha=8.0),
    LoraConfig(rank=1, alpha=0.5, targets=("w2", "wo")),
    LoraConfig(rank=16, alpha=32.0, targets=("wk",), rank_stabilized=True),
]
WEIGHTS = [(name, layer) for layer in range(MODEL.n_layers) for name in IN_OUT_DIMS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    peft.write(folder, MODEL, random_pairs(MODEL, LORAS[0]))
    return folder


@pytest.mark.parametrize("lora", LORAS)
def test_every_bit_survives_the_round_trip(tmp_path, lora):
    pairs = random_pairs(MODEL, lora)
    peft.write(tmp_path, MODEL, pairs)
    back = peft.read(tmp_path, MODEL)
    assert back.lora.scale == lora.scale
    assert {*back.lora.targets} == {*lora.targets}
    for name, layer in WEIGHTS:
        if name in lora.targets:
            for ours, theirs in zip(pairs.read(name, layer), back.read(name, layer), strict=True):
                assert ours.dtype == theirs.dtype == np.float32
                np.testing.assert_array_equal(ours, theirs)


def test_the_names_shapes_and_settings_are_those_of_peft(folder):
    tensors = read_tensors(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * MODEL.n_layers
    prefix = "base_model.model.model.layers.1."
    for name, a, b in [
        ("self_attn.q_proj", (4, 32), (64, 4)),
        ("self_attn.k_proj", (4, 32), (16, 4)),
        ("self_attn.o_proj", (4, 64), (32, 4)),
        ("mlp.gate_proj", (4, 32), (64, 4)),
        ("mlp.down_proj", (4, 64), (32, 4)),
    ]:
        shapes = [tensors[f"{prefix}{name}.lora_{side}.weight"].shape for side in "AB"]
        assert shapes == [a, b]
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["bias"]) == (4, 8.0, "none")
    assert settings["target_modules"] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip


def test_a_merged_weight_is_peft_s_matrix_plus_its_scaled_product(folder):
    """PEFT adds scale · B·A to the matrix [out, in] of transformers (`get_delta_weight`)."""
    tensors, pairs = read_tensors(folder / "adapter_model.safetensors"), peft.read(folder, MODEL)
    layout, rng = Layout(huggingface.NAMES), np.random.default_rng(0)
    for name, layer in WEIGHTS:
        weight = Weight(name, layer)
        ours = rng.standard_normal(MODEL.shape(AXES[name].ours), np.float32)
        module = huggingface.NAMES[name].format(layer).removesuffix(".weight")
        a, b = (
            tensors[f"base_model.model.{module}.lora_{side}.weight"].astype(np.float64)
            for side in "AB"
        )
        (theirs,) = layout.from_ours(MODEL, weight, ours)
        (merged,) = layout.from_ours(MODEL, weight, merge_pair(ours, pairs.read(*weight), 2.0))
        # R + 3 roundings of terms that are at most the sum of their magnitudes.
        bound = (4 + 3) * 2.0**-24 * (np.abs(theirs) + 2 * np.abs(b) @ np.abs(a))
        assert np.all(np.abs(merged - (theirs + 2.0 * b @ a)) <= bound)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_pairs_of_16_bits_are_read_exactly(folder, tmp_path, dtype):
    tensors = read_tensors(folder / "adapter_model.safetensors")
    rounded = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "adapter_model.safetensors", rounded)
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    a, _ = peft.read(tmp_path, MODEL).read("w1", 1)
    name = "base_model.model.model.layers.1.mlp.gate_proj.lora_A.weight"
    np.testing.assert_array_equal(a, rounded[name].T.astype(np.float32))


def changed_copy(folder, copy, settings, tensors):
    """Writes a changed copy; a tensor or setting that is `...` is removed."""
    copy.mkdir()
    content = json.loads((folder / "adapter_config.json").read_text()) | settings
    content = {key: value for key, value in content.items() if value is not ...}
    (copy / "adapter_config.json").write_text(json.dumps(content))
    arrays = read_tensors(folder / "adapter_model.safetensors") | tensors
    arrays = {name: array for name, array in arrays.items() if array is not ...}
    write_tensors(copy / "adapter_model.safetensors", arrays)
    return copy


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B1 = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXTRA = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": np.ones(64),
    "base_model.model.lm_head.lora_A.weight": np.ones((4, 32), np.float32),
    "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight": np.ones((4, 32), np.float32),
    "base_model.model.model.norm.weight": np.ones(32, np.float32),
}
REFUSED = [
    ({"peft_type": "LOHA"}, {}, "has 'LOHA' as peft_type: only LORA is supported"),
    ({"r": 8}, {}, r"is \(4, 32\), but adapter_config.json and the base require \(8, 32\)"),
    ({"r": "8"}, {}, "has '8' as r, which must be a positive integer"),
    ({"r": 1 << 40}, {}, "which must be a positive integer"),
    ({"lora_alpha": ...}, {}, "has None as lora_alpha, which must be a positive number"),
    ({"lora_alpha": -1}, {}, "has -1 as lora_alpha, which must be a positive number"),
    ({"rank_pattern": {"q_proj": 8}}, {}, "sets rank_pattern, which is not supported: merge"),
    ({"alpha_pattern": {"q_proj": 8}}, {}, "sets alpha_pattern, which is not supported"),
    ({"use_dora": True}, {}, "sets use_dora, which is not supported"),
    ({"bias": "all"}, {}, "sets bias, which is not supported"),
    ({"modules_to_save": ["lm_head"]}, {}, "sets modules_to_save, which is not supported"),
    ({"fan_in_fan_out": True}, {}, "sets fan_in_fan_out, which is not supported"),
    ({"layers_to_transform": [1]}, {}, "sets layers_to_transform, which is not supported"),
    ({"use_new_thing": 1}, {}, "sets use_new_thing, which is not supported"),
    ({"use_rslora": "yes"}, {}, "has 'yes' as use_rslora, which must be true or false"),
    ({"init_lora_weights": "pissa_niter_16"}, {}, "which also changes the weights of the base"),
    ({"target_modules": 3}, {}, "has 3 as target_modules, which must be a list of names or a"),
    ({"target_modules": ATTENTION}, {}, "layers.0.mlp.gate_proj has pair there, but target_mod"),
    ({}, {A0: ...}, f"lacks {A0}, but other layers or the other half of the pair are there"),
    ({}, {B1: ...}, f"lacks {B1}"),
    ({}, {B1: np.ones((4, 32), np.float32)}, r"is \(4, 32\), but .* require \(32, 4\)"),
    ({}, {A0: np.ones((4, 32), np.int32)}, "is of type int32: pairs must be one of float32"),
    *(({}, {name: array}, f"contains {name}: pairs of") for name, array in EXTRA.items()),
]


@pytest.mark.parametrize(("settings", "tensors", "sentence"), REFUSED)
def test_a_folder_that_is_not_plain_lora_of_this_model_is_refused_in_a_sentence(
    folder, tmp_path, settings, tensors, sentence
):
    with pytest.raises(InputError, match=sentence) as raised:
        peft.read(changed_copy(folder, tmp_path / "copy", settings, tensors), MODEL)
    message = str(raised.value)
    assert str(tmp_path) in message
    assert "\n" not in message
    assert ": " in message


ACCEPTED = [
    {"target_modules": r".*\.(q|k|v|o|gate|up|down)_proj"},
    {"target_modules": r"(((a+)+)+)+$"},  # never evaluated: it would take years
    {"target_modules": ["self_attn.q_proj", *ATTENTION[1:], "gate_proj", "up_proj", "down_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": ["nothing"]},
    {"use_rslora": ..., "use_dora": ..., "lora_dropout": 0.1, "peft_version": "9"},
    {"init_lora_weights": "gaussian", "layer_replication": None, "trainable_token_indices": None},
]


@pytest.mark.parametrize("settings", ACCEPTED)
def test_settings_that_change_nothing_are_accepted(folder, tmp_path, settings):
    pairs = peft.read(changed_copy(folder, tmp_path / "copy", settings, {}), MODEL)
    assert pairs.lora == LORAS[0]


def test_damaged_files_are_refused_in_a_sentence(folder, tmp_path):
    copy = changed_copy(folder, tmp_path / "copy", {}, {})
    path = copy / "adapter_model.safetensors"
    data = path.read_bytes()
    for content, sentence in [
        (data[:-1], "is cut short"),
        (data[:100], "is cut short inside its header"),
        (data + b"x", "is damaged: it has"),
        (b"", "is cut short inside its header"),
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=sentence):
            peft.read(copy, MODEL)
    path.unlink()
    with pytest.raises(InputError, match=r"there is no .*adapter_model.safetensors"):
        peft.read(copy, MODEL)
    path.write_bytes(data)
    (copy / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config.json is not valid JSON"):
        peft.read(copy, MODEL)
    with pytest.raises(InputError, match=r"lacks base_model.model.model.layers.2"):
        peft.read(folder, tiny_model(n_heads=8, n_kv_heads=2, n_layers=3))
