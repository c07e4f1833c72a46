"""The plan of a run on preferences that also evaluates: from its configuration to its report."""

from dataclasses import replace

import pytest
from conftest import mesh_of, peer, tiny_config
from single_compilation import compile_once

from llama_jax.config import yaml_file
from llama_jax.errors import InputError
from llama_jax.plan import topology, training, training_program, training_report

RUN = """\
model: {dim: 256, hidden_dim: 256, n_layers: 1, n_heads: 2, n_kv_heads: 1, head_dim: 128,
  vocab_size: 256, context: 128, dtype: bfloat16, remat: none}
mesh: {data: 1, fsdp: 4}
data: {mixture: {data/preferences: 1}, batch_size: 4, seq_len: 128}
training: {out: runs/dpo, steps: 1000, init_from: models/base, objective: dpo,
  evaluate: {tasks: [openbookqa]}}
"""


@pytest.mark.slow
def test_a_run_of_dpo_is_planned_from_its_own_configuration(tmp_path, capsys, monkeypatch):
    peer("libtpu")
    compile_once(monkeypatch)
    file = tmp_path / "dpo.yaml"
    file.write_text(RUN)
    config = yaml_file.load(str(file), [])
    plan = training.plan_training(config, topology.parse("v5p:2x2x1"), lambda _: None)
    # The reference is a frozen copy of the weights, without moments.
    shard = config.model.n_params / 4
    assert plan.memory["weights"] == pytest.approx(4 * shard, rel=0.01)
    assert plan.memory["frozen weights"] == plan.memory["weights"]
    assert plan.memory["optimizer"] == pytest.approx(8 * shard, rel=0.01)
    assert plan.fits
    assert plan.step_seconds > 0
    # Forward and backward of the weights, and forward of the reference; recomputation is extra.
    assert plan.hardware_flops * 4 > 0.9 * config.flops_per_token * plan.tokens_per_step
    training_report.show(plan)
    printed = capsys.readouterr().out
    assert "frozen weights" in printed
    assert "v5p training" in printed  # the sentence about the correction


def test_dpo_without_isolated_documents_is_refused_in_a_sentence():
    config = tiny_config(init_from="m", objective="dpo")
    config = replace(config, data=replace(config.data, isolate_documents=False))
    with pytest.raises(InputError, match=r"set data\.isolate_documents to true"):
        training_program.trace_train_step(config, mesh_of((1, 1, 1)))
