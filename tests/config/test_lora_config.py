"""The configuration of LoRA: limits, scale, number of parameters."""

import pytest

from llama_jax.config import yaml_file
from llama_jax.config.lora import IN_OUT_DIMS, LoraConfig
from llama_jax.errors import InputError
from llama_jax.model.quantize import MATRIX_DIMS

CONFIG = """\
model: {dim: 32, n_layers: 2, n_heads: 8, n_kv_heads: 2, head_dim: 8, hidden_dim: 64,
  vocab_size: 320}
data: {mixture: {data/x: 1}, batch_size: 8}
training: {out: runs/x, steps: 10, init_from: models/x}
lora: {rank: 16}
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


def test_a_rank_above_the_smallest_side_of_a_target_is_refused(path):
    assert yaml_file.load(path).lora == LoraConfig(rank=16)
    sentence = r"lora.rank \(17\) is larger than the smaller side of wk \(16\), the largest rank"
    with pytest.raises(InputError, match=sentence):
        yaml_file.load(path, ["lora.rank=17"])
    assert yaml_file.load(path, ["lora={rank: 32, targets: [wq, w2]}"]).lora


@pytest.mark.parametrize("storage", ["param_dtype=bfloat16", "quantized=int8"])
def test_only_a_frozen_base_is_bfloat16_or_int8(path, storage):
    assert yaml_file.load(path, [f"model.{storage}"])
    with pytest.raises(InputError, match="only for inference and for the frozen base of lora"):
        yaml_file.load(path, [f"model.{storage}", "lora="])


def test_scale_and_number_of_parameters(path):
    lora = LoraConfig(rank=16, alpha=32)
    assert lora.scale == 2
    assert LoraConfig(rank=16, alpha=32, rank_stabilized=True).scale == 8
    model = yaml_file.load(path).model
    attention = (32 + 64) + 2 * (32 + 16) + (64 + 32)  # wq, wk and wv, wo
    assert lora.n_params(model) == 2 * 16 * (attention + 3 * (32 + 64))


def test_the_table_has_each_matrix_with_its_axes():
    assert {name: "".join(sides) for name, sides in IN_OUT_DIMS.items()} == MATRIX_DIMS
    assert set(LoraConfig().targets) == set(MATRIX_DIMS)
