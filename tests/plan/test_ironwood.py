"""Plans for Ironwood (tpu7x), whose chips are two JAX devices each."""

import pytest
from conftest import peer
from single_compilation import compile_once

from llama_jax.config import yaml_file
from llama_jax.plan import topology, training, training_report

RUN = """\
model: {dim: 256, hidden_dim: 256, n_layers: 1, n_heads: 2, n_kv_heads: 1, head_dim: 128,
  vocab_size: 256, context: 256, dtype: bfloat16}
mesh: {fsdp: -1, data: 1}
data: {mixture: {data/text: 1}, batch_size: 16, seq_len: 256}
training: {out: runs/ironwood, steps: 1000}
"""


@pytest.mark.slow
def test_a_run_on_ironwood_is_planned_for_both_devices_of_each_chip(tmp_path, capsys, monkeypatch):
    peer("libtpu")
    compile_once(monkeypatch)
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    pod = topology.parse("tpu7x:2x2x1")
    plan = training.plan_training(yaml_file.load(str(file), []), pod, lambda _: None)
    assert plan.config.mesh.fsdp == 8
    n_params = plan.config.model.n_params
    assert plan.memory["weights"] == pytest.approx(4 * n_params / 8, rel=0.01)
    assert plan.memory["optimizer"] == pytest.approx(8 * n_params / 8, rel=0.01)
    assert plan.fits
    assert plan.step_seconds > 0
    training_report.show(plan)
    printed = capsys.readouterr().out
    assert "tpu7x:2x2x1: 4 chips" in printed
    assert "memory of a device, 2 in a chip" in printed
    report = training_report.as_dict(plan)
    rate = report["tokens_per_second_per_chip"]
    assert rate == pytest.approx(16 * 256 / plan.step_seconds / 4)
