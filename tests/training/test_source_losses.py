"""The losses of the sources of a mixture: exact parts of the loss, from its phase on."""

import json
import math
from dataclasses import replace
from functools import partial

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import run, tiny_config

from llama_jax.checkpoint.training_checkpoints import TrainingCheckpoints
from llama_jax.checkpoint.tree import eval_shape_on_mesh
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import CheckpointConfig, DataConfig, LoggingConfig
from llama_jax.data.batches import Batches
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training import loop
from llama_jax.training.loss import RowSums
from llama_jax.training.loss_figure import draw_losses
from llama_jax.training.metrics import read_metrics
from llama_jax.training.source_losses import held_out_means, split_loss
from llama_jax.training.step import eval_step, init_state

STEPS = 8


def test_the_losses_of_the_sources_add_up_to_the_loss_of_the_step():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 50, (4, 16)).astype(np.int32)
    targets[0, 0] = targets[2, 5] = 0
    rows = RowSums((targets * rng.uniform(0, 12, (4, 16))).astype(np.float32), targets)
    folders = [*rng.choice(["a", "b/c", "d"], 62), "never trained", "d"]
    rows.nll[3, 14] = targets[3, 14] = 0
    found = split_loss(rows, folders)
    assert found.keys() == {
        f"{kind}/{x}" for kind in ("loss", "targets") for x in ("a", "b/c", "d")
    }
    parts = [found[f"loss/{x}"] * found[f"targets/{x}"] for x in ("a", "b/c", "d")]
    assert math.fsum(parts) == pytest.approx(rows.nll.sum(dtype=np.float64), rel=1e-14)
    assert sum(found[f"targets/{x}"] for x in ("a", "b/c", "d")) == targets.sum()
    own = np.array([name == "b/c" for name in folders]).reshape(4, 16)
    expected = rows.nll[own].sum(dtype=np.float64) / targets[own].sum()
    assert found["loss/b/c"] == pytest.approx(expected, rel=1e-14)


def test_a_source_whose_loss_is_not_finite_is_named():
    rows = RowSums(np.float32([[1, np.nan]]), np.int32([[2, 2]]))
    found = split_loss(rows, ["a", "b"])
    assert found["loss/a"] == 0.5
    assert math.isnan(found["loss/b"])


@pytest.fixture(scope="module")
def mixed(token_folder, other_token_folder, tmp_path_factory):
    """A finished run of two sources, of which the second comes after four steps."""
    first, second = str(token_folder), str(other_token_folder)
    folder = tmp_path_factory.mktemp("runs") / "mixed"
    config = replace(
        tiny_config(out=str(folder), steps=STEPS, eval_every=2, eval_batches=4, micro_batches=2),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        data=DataConfig(
            mixture={first: 1.0}, phases={4: {first: 0.25, second: 0.75}}, batch_size=8, seq_len=16
        ),
        checkpoint=CheckpointConfig(every=4, keep=3),
        logging=LoggingConfig(progress=False),
    )
    eval_step.clear_cache()
    assert loop.run(config).finished
    compiled = eval_step._cache_size()
    return config, folder, compiled


def test_each_step_has_the_loss_of_each_source_in_it(mixed):
    config, folder, _ = mixed
    first, second = config.data.folders
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    assert len(records) == STEPS
    for record in records:
        names = {first} if record["step"] <= 4 else {first, second}
        assert {name for name in record if name.startswith("loss/")} == {f"loss/{n}" for n in names}
        total = math.fsum(record[f"loss/{n}"] * record[f"targets/{n}"] for n in names)
        # The device adds 8 rows in float32: each addition rounds by at most 2⁻²⁴.
        assert total / record["targets"] == pytest.approx(record["loss"], rel=8 * 2**-24)
        assert sum(record[f"targets/{n}"] for n in names) == record["targets"]
        assert 0 <= record["data_wait"] <= 1
    assert sum(r["targets/" + second] for r in records[4:]) > 0.6 * sum(
        r["targets"] for r in records[4:]
    )


def test_a_source_joins_the_validation_with_its_phase(mixed):
    config, folder, compiled = mixed
    first, second = config.data.folders
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "validation_loss" in r]
    assert [r["step"] for r in records] == [2, 4, 6, 8]
    for record in records[:2]:
        assert record["validation_loss"] == record[f"validation_loss/{first}"]
        assert f"validation_loss/{second}" not in record
    for record in records[2:]:
        a, b = (record[f"validation_loss/{name}"] for name in (first, second))
        assert record["validation_loss"] == pytest.approx(0.25 * a + 0.75 * b, rel=1e-14)
        assert a != b
    assert compiled == 1  # one program for all sources


def test_the_validation_loss_of_a_source_is_that_of_a_run_of_this_source_alone(mixed):
    config, folder, _ = mixed
    first, second = config.data.folders
    [*_, last] = [r for r in read_metrics(folder / "metrics.jsonl") if "validation_loss" in r]
    with jax.set_mesh(make_mesh(config.mesh)):
        like = eval_shape_on_mesh(partial(init_state, config), jax.random.key(0))
        checkpoints = TrainingCheckpoints(folder / "checkpoints")
        _, trained, _ = checkpoints.restore(STEPS, *like)
        for name in (first, second):
            own = DataConfig(mixture={name: 1.0}, batch_size=8, seq_len=16)
            alone = replace(config, data=own, training=replace(config.training, eval_batches=2))
            means = held_out_means(alone, Batches(own, 2), STEPS, trained, None)
            assert means == {"loss": pytest.approx(last[f"validation_loss/{name}"], rel=1e-6)}


def test_tensorboard_info_and_the_figure_have_each_source(mixed, capsys, tmp_path):
    config, folder, _ = mixed
    [events] = (folder / "tensorboard").iterdir()
    logged = events.read_bytes()
    records = read_metrics(folder / "metrics.jsonl")
    code, out, _ = run(capsys, "info", folder)
    assert code == 0
    for name in config.data.folders:
        for kind in ("loss", "validation_loss", "targets"):
            assert f"{kind}/{name}".encode() in logged
        loss, validation = (
            [r for r in records if f"{kind}/{name}" in r][-1]
            for kind in ("loss", "validation_loss")
        )
        assert (
            f"{name}: loss {loss[f'loss/{name}']:.4f} in step {loss['step']}, validation"
            f" {validation[f'validation_loss/{name}']:.4f} after step {STEPS}\n"
        ) in out
    assert b"data_wait" in logged
    steps = [r for r in records if "data_wait" in r]
    waited = sum(r["data_wait"] * r["step_seconds"] for r in steps)
    share = waited / sum(r["step_seconds"] for r in steps)
    assert f"data wait   {share:.2%} of the step time" in out

    height, width, _ = plt.imread(folder / "loss.png").shape
    assert height == 2 * 540  # a panel of the loss, a panel of the sources
    assert width == 960
    # With the second source's losses, the panel differs from one without them.
    both = plt.imread(folder / "loss.png")
    second = config.data.folders[1]
    lines = [
        {name: value for name, value in record.items() if not name.endswith(second)}
        for record in records
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_losses(tmp_path, None)
    assert not np.array_equal(plt.imread(tmp_path / "loss.png")[540:], both[540:])
