"""Runs of DPO: accuracy rises, extended runs equal long ones, wrong data and references refused."""

import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from conftest import tiny_model

from llama_jax.checkpoint.model_folders import save_model
from llama_jax.cli.describe_folder import describe
from llama_jax.config.lora import LoraConfig
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainingConfig,
)
from llama_jax.errors import InputError
from llama_jax.model.weights import Llama
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.runtime.storage import parse_path
from llama_jax.training import loop
from llama_jax.training.metrics import read_metrics

STEPS = 16
TIMES = (
    "step_seconds",
    "tokens_per_second",
    "data_wait",
    "goodput",
    "time",
)  # no two runs have the same ones
MEANS = ["loss", "chosen_reward", "rejected_reward", "margin", "accuracy", "preferences"]


def config(folder, data, base, lora=None, **training) -> Config:
    settings: dict[str, Any] = {"steps": STEPS, "eval_every": 8, "objective": "dpo"}
    return Config(
        model=tiny_model(context=128),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        data=DataConfig(mixture={str(data): 1.0}, batch_size=16, seq_len=16),
        # With this schedule, an extended run equals a long one.
        optimizer=OptimizerConfig(schedule="wsd", warmup_steps=2, peak_lr=3e-3),
        lora=lora,
        training=TrainingConfig(out=str(folder), init_from=str(base), **(settings | training)),
        checkpoint=CheckpointConfig(every=8),
        logging=LoggingConfig(progress=False, tensorboard=False),
    )


def records(folder, name="loss"):
    return [record for record in read_metrics(folder / "metrics.jsonl") if name in record]


@pytest.fixture(scope="module", params=[None, LoraConfig(rank=8, alpha=64.0)], ids=["full", "lora"])
def long_run(request, preference_folder, model_folder, tmp_path_factory):
    """The configuration of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("runs") / "long"
    run = config(folder, preference_folder, model_folder, request.param)
    assert loop.run(run).finished
    return run


def test_the_accuracy_rises_from_a_loss_of_log_2(long_run):
    steps = records(parse_path(long_run.training.out))
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    first = steps[0]
    assert first["loss"] == pytest.approx(math.log(2), rel=2**-23)
    assert first["margin"] == pytest.approx(0, abs=1e-6)
    assert np.mean([record["accuracy"] for record in steps[-4:]]) > 0.8
    assert steps[-1]["margin"] > 0.05
    for record in steps:
        margin = record["chosen_reward"] - record["rejected_reward"]
        assert record["margin"] == pytest.approx(margin, abs=1e-6)
        assert 16 <= record["preferences"] < record["targets"]


def test_validation_has_the_same_means(long_run):
    found = records(parse_path(long_run.training.out), "validation_loss")
    assert [record["step"] for record in found] == [8, 16]
    assert {name.removeprefix("validation_") for name in found[0]} - {"step"} == set(MEANS)
    loss, accuracy = (found[1][f"validation_{name}"] for name in ("loss", "accuracy"))
    line = f"validation  {loss:.4f} after step 16, {accuracy:.1%} of the preferences right"
    assert line in describe(parse_path(long_run.training.out))


@pytest.mark.slow
def test_an_extended_run_equals_a_long_one(long_run, tmp_path):
    short = replace(long_run, training=replace(long_run.training, out=str(tmp_path), steps=8))
    assert loop.run(short).step == 8
    loop.run(replace(short, training=replace(short.training, steps=STEPS)))
    for name in ("loss", "validation_loss"):
        ours, theirs = (
            records(tmp_path, name),
            records(parse_path(long_run.training.out), name),
        )
        for a, b in zip(ours, theirs, strict=True):
            assert {**a, **dict.fromkeys(TIMES)} == {**b, **dict.fromkeys(TIMES)}


def test_a_run_with_another_reference_is_refused(long_run, tmp_path):
    with jax.set_mesh(one_device_mesh()):
        model = jax.jit(Llama, static_argnums=0)(long_run.model, jax.random.key(1))
        save_model(tmp_path / "other", long_run.model, model, None)
    changed = replace(long_run.training, init_from=str(tmp_path / "other"), steps=STEPS + 1)
    with pytest.raises(InputError, match=r"other, training\.init_from, are not those with which"):
        loop.run(replace(long_run, training=changed))


@pytest.mark.parametrize(
    ("objective", "folder", "sentence"),
    [
        ("dpo", "token_folder", r"training\.objective is dpo, but .* contains text: give a folder"),
        ("dpo", "chat_folder", r"training\.objective is dpo, but .* contains chats: give a folder"),
        (
            "next_token",
            "preference_folder",
            r"contains preferences: set training\.objective to dpo",
        ),
    ],
)
def test_data_of_another_kind_are_refused(
    request, model_folder, tmp_path, objective, folder, sentence
):
    data = request.getfixturevalue(folder)
    with pytest.raises(InputError, match=sentence):
        loop.run(config(tmp_path / "run", data, model_folder, objective=objective))
