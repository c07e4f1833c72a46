"""A run continues after its end, and prints how its learning rate changes."""

import shutil
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from conftest import tiny_config, tiny_model

from llama_jax.checkpoint.training_checkpoints import TrainingCheckpoints
from llama_jax.checkpoint.tree import eval_shape_on_mesh
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainingConfig,
)
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training import loop
from llama_jax.training.metrics import read_metrics
from llama_jax.training.optimizer import learning_rate
from llama_jax.training.schedule_change import describe_schedule_change
from llama_jax.training.step import init_state


def wsd_run(folder, data, steps, decay_steps=0):
    """Trains, or extends, a WSD run; returns (loss, gradient norm, learning rate) of each step."""
    config = Config(
        model=tiny_model(),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        data=DataConfig(mixture={str(data): 1.0}, batch_size=8, seq_len=16),
        optimizer=OptimizerConfig(
            schedule="wsd", warmup_steps=2, peak_lr=1e-2, decay_steps=decay_steps
        ),
        training=TrainingConfig(out=str(folder), steps=steps, eval_every=0, eval_batches=1),
        checkpoint=CheckpointConfig(every=7, keep=2),
        logging=LoggingConfig(progress=False, tensorboard=False),
    )
    assert loop.run(config).step == steps
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, steps + 1))
    rates = jax.vmap(learning_rate(config.optimizer, steps))(np.arange(steps))
    applied = [r["learning_rate"] for r in records]
    np.testing.assert_allclose(applied, rates, rtol=1e-6)
    return np.array([(r["loss"], r["grad_norm"], r["learning_rate"]) for r in records])


def saved_state(folder, data, step):
    """Returns all weights and the optimizer state of a checkpoint."""
    config = tiny_config()
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        like = eval_shape_on_mesh(partial(init_state, config), jax.random.key(0))
        _, *state = TrainingCheckpoints(folder / "checkpoints").restore(step, *like)
        return jax.tree.map(np.asarray, state)


def test_a_wsd_run_that_is_extended_twice_equals_one_long_run_bit_for_bit(
    token_folder, tmp_path, capsys
):
    long, staged, decayed = (tmp_path / name for name in ("long", "staged", "decayed"))
    expected = wsd_run(long, token_folder, 10, decay_steps=3)
    assert expected[:7, 2].tolist() == [*np.float32([5e-3] + [1e-2] * 6)]
    assert np.all(np.diff(expected[6:, 2]) < 0)
    assert expected[9, 2] == pytest.approx(1e-3)

    for steps in (3, 5, 7):
        stable = wsd_run(staged, token_folder, steps)
    np.testing.assert_array_equal(stable, expected[:7])
    jax.tree.map(
        np.testing.assert_array_equal,
        saved_state(staged, token_folder, 7),
        saved_state(long, token_folder, 7),
    )
    assert "the learning rate" not in capsys.readouterr().err  # the stable phase continues

    shutil.copytree(staged, decayed)
    np.testing.assert_array_equal(wsd_run(decayed, token_folder, 10, decay_steps=3), expected)
    jax.tree.map(
        np.testing.assert_array_equal,
        saved_state(decayed, token_folder, 10),
        saved_state(long, token_folder, 10),
    )
    status = capsys.readouterr().err
    assert f"{decayed}: optimizer.decay_steps changes from 0 to 3" in status
    assert f"{decayed}: the learning rate decays after step 7, until step 10" in status


def config_of(schedule, steps, decay_steps=0, final_lr_fraction=0.1):
    optimizer = OptimizerConfig(
        schedule=schedule,
        decay_steps=decay_steps,
        warmup_steps=2,
        final_lr_fraction=final_lr_fraction,
    )
    return replace(tiny_config(steps=steps), optimizer=optimizer)


DECAYED = (
    "the learning rate has decayed since step 80, and the run continues from the decayed weights of"
    " step 100; "
)


@pytest.mark.parametrize(
    ("previous", "now", "saved_steps", "text"),
    [
        (("cosine", 100), ("cosine", 100), [50], None),
        (("wsd", 100, 20), ("wsd", 100, 20), [90], None),
        (("wsd", 100), ("wsd", 200), [50, 100], None),
        (("wsd", 100, 20), ("wsd", 200), [50, 80], None),
        (
            ("cosine", 100),
            ("cosine", 200),
            [100],
            "a cosine extends over all training.steps, now 200 instead of 100: the learning rate of"
            " step 101 and later ones changes",
        ),
        (
            ("cosine", 100),
            ("cosine", 100, 0, 0.2),
            [50],
            "a cosine falls to final_lr_fraction of peak_lr, now 0.2 instead of 0.1: the learning"
            " rate of step 51 and later ones changes",
        ),
        (("wsd", 100), ("wsd", 100, 0, 0.2), [50], None),
        (
            ("wsd", 100, 20),
            ("wsd", 100, 20, 0.2),
            [70],
            "the learning rate decays after step 80, until step 100",
        ),
        (
            ("cosine", 100),
            ("wsd", 200, 20),
            [50, 100],
            "step 101 and later ones have the learning rate of the schedule wsd; the 100 steps done"
            " had that of cosine",
        ),
        (
            ("wsd", 100),
            ("wsd", 120, 20),
            [100],
            "the learning rate decays after step 100, until step 120",
        ),
        (
            ("wsd", 100),
            ("wsd", 110, 20),
            [100],
            "a decay over the last 20 of 110 steps starts after step 90, but 100 steps are done:"
            " the learning rate drops at once in step 101",
        ),
        (
            ("wsd", 100, 20),
            ("wsd", 200),
            [50, 75, 90, 100],
            DECAYED + "to continue from before the decay, resume a copy of the run folder without"
            " the checkpoints after step 75",
        ),
        (
            ("wsd", 100, 20),
            ("wsd", 200, 20),
            [90, 100],
            DECAYED + "no checkpoint from before the decay is retained (checkpoint.keep_every)",
        ),
    ],
)
def test_a_resumed_run_prints_one_line_about_its_learning_rate(previous, now, saved_steps, text):
    assert describe_schedule_change(config_of(*now), config_of(*previous), saved_steps) == text


def test_a_finished_run_with_fewer_steps_prints_no_schedule_change(token_folder, tmp_path, capsys):
    wsd_run(tmp_path / "run", token_folder, 3)
    config = replace(
        tiny_config(out=str(tmp_path / "run"), steps=2),
        data=DataConfig(mixture={str(token_folder): 1.0}, batch_size=8, seq_len=16),
        optimizer=OptimizerConfig(schedule="cosine", warmup_steps=2, peak_lr=1e-2),
    )
    assert loop.run(config).step == 3
    status = capsys.readouterr().err
    assert "is finished: 3 steps are done, no step remains" in status
    assert "learning rate" not in status
