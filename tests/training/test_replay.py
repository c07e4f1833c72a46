"""A step that is computed again equals that of the run bit for bit, also of a killed, moved run."""

import json
import math
import random
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import run, tiny_config, tiny_model
from lora_runs import LORA, write_base
from test_ledger import run_until_killed

from llama_jax.config import yaml_file
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import CheckpointConfig, DataConfig, LoggingConfig
from llama_jax.runtime.storage import list_files
from llama_jax.training import loop
from llama_jax.training.layer_norms import by_layer, compute_norms, to_numbers
from llama_jax.training.metrics import read_metrics
from llama_jax.training.replay import replay
from llama_jax.training.start import initial_state, make_run_mesh
from llama_jax.training.step import gradients

STEPS, EVERY, KILLED_AT = 20, 4, (11,)


def config_of(out, *folders, objective="next_token", base=None, lora=None):
    config = tiny_config(
        tiny_model(n_layers=2), out=str(out), steps=STEPS, eval_every=0, objective=objective,
        init_from=base and str(base), micro_batches=2,
    )  # fmt: skip
    return replace(
        config,
        lora=lora,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        data=DataConfig(mixture={str(f): 1.0 for f in folders}, batch_size=8, seq_len=16),
        checkpoint=CheckpointConfig(every=EVERY, keep=2),
        logging=LoggingConfig(progress=False, tensorboard=False),
    )


def train_with_kills(config, monkeypatch):
    for step in KILLED_AT:
        run_until_killed(config, step, monkeypatch)
    assert loop.run(config).finished


def steps_of(config):
    records = read_metrics(loop.parse_path(config.training.out) / "metrics.jsonl")
    return {record["step"]: record for record in records if "grad_norm" in record}


@pytest.fixture(scope="module")
def moved(token_folder, other_token_folder, tmp_path_factory):
    """The configuration of a finished run that was killed, resumed and then moved."""
    folder = tmp_path_factory.mktemp("replay")
    config = config_of(folder / "run", token_folder, other_token_folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        train_with_kills(config, monkeypatch)
    shutil.move(folder / "run", folder / "moved")
    # Of the early checkpoints none is retained: keep is 2.
    return replace(config, training=replace(config.training, out=str(folder / "moved")))


def files(config):
    return {
        str(path): path.read_bytes() for path in list_files(loop.parse_path(config.training.out))
    }


def test_replayed_steps_of_a_killed_and_moved_run_are_equal_bit_for_bit(moved):
    before = files(moved)
    records = steps_of(moved)
    # Checkpoints 16 and 20 remain; the first steps start from the initial weights.
    for step in [1, 17, *random.Random(0).sample([2, 3, 4, 18, 19, 20], 3)]:
        found = replay(moved, step)
        assert found.equal
        assert (found.start, found.loss) == (16 if step > 16 else 0, records[step]["loss"])
        assert found.grad_norm == records[step]["grad_norm"]
        # The rows give the loss of the batch, and of each source as it was recorded.
        total = math.fsum(row.loss * row.targets for row in found.rows)
        targets = sum(row.targets for row in found.rows)
        assert total / targets == pytest.approx(found.loss, rel=1e-6)
        for source in moved.data.folders:
            own = [row for row in found.rows if row.source == source]
            assert sum(row.targets for row in own) == records[step].get(f"targets/{source}", 0)
        squares = sum(x**2 for x in by_layer(found.norms["gradients"]).values())
        assert math.sqrt(squares) == pytest.approx(found.grad_norm, rel=1e-5)
    assert files(moved) == before


def test_on_another_mesh_a_step_is_equal_within_rounding(moved):
    found = replay(replace(moved, mesh=MeshConfig(fsdp=4, tensor=2)), 18)
    records = steps_of(moved)
    # Float32 sums in another order, over two steps.
    assert found.loss == pytest.approx(records[18]["loss"], rel=1e-5)
    assert found.grad_norm == pytest.approx(records[18]["grad_norm"], rel=1e-4)


def test_the_command_prints_the_step_its_norms_and_its_rows(moved, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml_file.dump(moved))
    code, out, _ = run(capsys, "train", path, "--replay", 17, "--rows", 1)
    assert code == 0
    assert "step 17, computed from checkpoint 16" in out
    assert "equal to metrics.jsonl bit for bit" in out
    assert "layer 2 " in out
    assert out.count("══ row ") == 1
    code, out, _ = run(capsys, "train", path, "--replay", 17, "--json")
    assert (code, json.loads(out)["equal"], len(json.loads(out)["rows"])) == (0, True, 8)
    for arguments, sentence in {
        ("--replay", 21): "has done 20 steps: give one of them",
        ("--replay", 0): "has done 20 steps: give one of them",
        ("--replay", 9): "no checkpoint before this step (the oldest is 16)",
        ("--replay", 17, "optimizer.peak_lr=1"): "was trained with optimizer.peak_lr = 0.01",
        ("--replay", 17, f"training.out={tmp_path}/none"): "none",
        ("--rows", 3): "--rows and --json are for --replay",
    }.items():
        code, _, err = run(capsys, "train", path, *arguments)
        assert (code, sentence in err) == (2, True), err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "lora", "dpo"])
def test_steps_of_a_fine_tuning_run_are_equal_bit_for_bit(
    kind, token_folder, chat_folder, preference_folder, tmp_path
):
    base = write_base(tmp_path / "base", token_folder, context=64)
    data = preference_folder if kind == "dpo" else chat_folder
    objective = "dpo" if kind == "dpo" else "next_token"
    lora = replace(LORA, dropout=0.1) if kind == "lora" else None
    config = config_of(tmp_path / "run", data, objective=objective, base=base, lora=lora)
    config = replace(config, training=replace(config.training, steps=6))
    assert loop.run(config).finished
    found = replay(config, 6)
    assert (found.start, found.equal) == (4, True)
    losses = [row.loss for row in found.rows]
    assert all(loss is None for loss in losses) == (kind == "dpo")


def test_the_norms_are_those_of_each_layer(token_folder, tmp_path):
    config = config_of(tmp_path, token_folder)
    with jax.set_mesh(make_run_mesh(config)):
        trained, _ = initial_state(config)
        batch = loop.Batches(config.data, 2).train(0)
        norms = to_numbers(compute_norms(config, trained, batch, np.int32(0), None))
        grads = gradients(config, trained, batch).grads
    for tree, kind in ((trained, "weights"), (grads, "gradients")):
        wq, w1 = (np.asarray(getattr(tree.layers, name)[...]) for name in ("wq", "w1"))
        for i in range(2):
            assert norms[kind]["layers.wq"][i] == pytest.approx(np.linalg.norm(wq[i]), rel=1e-5)
            assert norms[kind]["layers.w1"][i] == pytest.approx(np.linalg.norm(w1[i]), rel=1e-5)
        head = np.linalg.norm(np.asarray(tree.output[...]))
        assert norms[kind]["output"] == pytest.approx(head, rel=1e-5)
