"""The plan of a LoRA run: memory by kind, and no gradient of the frozen weights."""

from dataclasses import replace

import pytest
from conftest import peer, tiny_config, tiny_model

from llama_jax.config.lora import LoraConfig
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import DataConfig
from llama_jax.parallel.mesh import make_mesh
from llama_jax.plan import search, topology, training, training_program, training_report
from llama_jax.plan.schedule import Collective

LORA = LoraConfig(rank=16)
POD = topology.parse("v5p:2x2x1")


def lora_run(**changes):
    model = tiny_model(
        dim=512, hidden_dim=1024, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=128,
        vocab_size=1024, context=256, dtype="bfloat16", **changes,
    )  # fmt: skip
    config = tiny_config(init_from="base", steps=1000)
    data = DataConfig(mixture={"x": 1.0}, batch_size=8, seq_len=256)
    return replace(config, model=model, lora=LORA, mesh=MeshConfig(fsdp=4), data=data)


@pytest.mark.slow
@pytest.mark.parametrize("storage", [{"param_dtype": "bfloat16"}, {"quantized": "int8"}])
def test_only_pairs_have_moments_and_exchanged_gradients(storage):
    peer("libtpu")
    config = lora_run(**storage)
    step = training_program.compile_train_step(
        config, make_mesh(config.mesh, topology.devices(POD)), POD.chip
    )
    memory = training._memory_by_kind(config, step)
    bytes_each = 1 if "quantized" in storage else 2
    # Scales of the output channels and norms are less than 3 % of the bytes.
    frozen = bytes_each * config.model.n_params / 4
    assert memory["frozen weights"] == pytest.approx(frozen, rel=0.03)
    pairs = memory["low-rank pairs"]
    # Sides of a matrix without D are not split over fsdp.
    n_params = LORA.n_params(config.model)
    assert 4 * n_params / 4 < pairs < 4 * n_params
    assert memory["optimizer"] == pytest.approx(2 * pairs, rel=1e-3)
    sent = {"reduce-scatter": 0.0, "all-reduce": 0.0}
    for event in step.program.events:
        if isinstance(event.starts, Collective) and event.starts.kind in sent:
            sent[event.starts.kind] += event.starts.bytes
    assert sum(sent.values()) < 2 * 4 * n_params  # gradients of the base would be 26 times as many
    assert config.model.n_params > 13 * n_params


def test_a_lora_plan_is_reported_with_its_trained_parameters(capsys):
    config = lora_run(quantized="int8")
    plan = training.TrainingPlan(config=config, pod=POD, memory={"frozen weights": 2.0**30})
    training_report.show(plan)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"beside {LORA.n_params(config.model):,} trained ones" in printed
    assert "frozen weights 1.00" in printed


def test_mfu_and_the_search_count_no_gradient_of_the_frozen_weights():
    config, full = lora_run(), replace(lora_run(), lora=None)
    T = config.data.seq_len
    weights = config.model.n_params - config.model.vocab_size * config.model.dim
    saved = 2 * weights - 6 * LORA.n_params(config.model)
    assert full.flops_per_token - config.flops_per_token == saved
    assert full.flops_per_token == config.model.flops_per_token(T)
    seconds = [search.estimate_seconds(run, POD) for run in (config, full)]
    assert seconds[0] < seconds[1]
    memory = [
        search.estimate_memory(run)
        for run in (lora_run(quantized="int8"), lora_run(param_dtype="bfloat16"), config, full)
    ]
    assert memory == sorted(memory)
    n_params = config.model.n_params
    assert memory[1] - memory[0] == n_params / 4  # a byte for each weight of a quarter
    assert memory[2] - memory[1] == 2 * n_params / 4
