"""A run whose newest checkpoint is damaged resumes from the one before it, with equal losses."""

import re
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import run as command
from conftest import tiny_model

from llama_jax.checkpoint import training_checkpoints
from llama_jax.checkpoint.training_checkpoints import TrainingCheckpoints
from llama_jax.config import yaml_file
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainingConfig,
)
from llama_jax.errors import Fault, InputError
from llama_jax.training import loop
from llama_jax.training.metrics import read_metrics

STEPS, EVERY = 8, 2


def config(folder, data, on_damage="previous"):
    return Config(
        model=tiny_model(),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        data=DataConfig(mixture={str(data): 1.0}, batch_size=8, seq_len=16),
        optimizer=OptimizerConfig(warmup_steps=2, peak_lr=1e-2),
        training=TrainingConfig(out=str(folder), steps=STEPS, eval_every=0, eval_batches=2),
        checkpoint=CheckpointConfig(every=EVERY, keep=10, on_damage=on_damage),
        logging=LoggingConfig(progress=False, tensorboard=False),
    )


def weights(folder):
    """Returns the bytes of each stored chunk of the last checkpoint."""
    last = folder / "checkpoints" / str(STEPS)
    return {p.relative_to(last): p.read_bytes() for p in last.rglob("*") if p.is_file()}


def losses(folder):
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    return np.array([r["loss"] for r in records])


@pytest.fixture(scope="module")
def undisturbed(token_folder, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert loop.run(config(folder, token_folder)).finished
    return folder


@pytest.fixture
def stopped(undisturbed, tmp_path):
    """The folder of the same run, killed after step 6: its checkpoints are of steps 2, 4 and 6."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / str(STEPS))
    return folder


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


CHUNK = "optimizer/.*layers.w1/c/1/.*"


def find(folder, pattern):
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return next(p for p in paths if re.fullmatch(pattern, p.relative_to(folder).as_posix()))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda step: flip_bit(find(step, CHUNK)), "computed digest is"),
        (lambda step: find(step, CHUNK).unlink(), "missing|NOT_FOUND"),
        (lambda step: flip_bit(step / "manifest.json"), "the checksum of manifest.json differs"),
        (lambda step: (step / "model/_METADATA").write_bytes(b""), "the checksum of model/_METADA"),
    ],
    ids=["flipped bit", "missing chunk", "manifest", "empty file"],
)
def test_the_run_resumes_from_the_checkpoint_before(
    damage, reason, undisturbed, stopped, token_folder, capsys
):
    damage(stopped / "checkpoints" / "6")
    capsys.readouterr()
    assert loop.run(config(stopped, token_folder)).finished
    lines = capsys.readouterr().err.splitlines()
    named = [line for line in lines if "is damaged" in line]
    assert len(named) == 1
    assert re.match(rf"{re.escape(str(stopped))}/checkpoints/6 is damaged \(.*", named[0])
    assert re.search(reason, named[0])
    assert f"{stopped}: resumes after step 4 of {STEPS}" in lines
    np.testing.assert_array_equal(losses(stopped), losses(undisturbed))
    assert weights(stopped) == weights(undisturbed)
    assert TrainingCheckpoints(stopped / "checkpoints").steps == [2, 4, 6, 8]


def test_an_incomplete_checkpoint_is_not_resumed_from(undisturbed, stopped, token_folder, capsys):
    (stopped / "checkpoints" / "6" / "manifest.json").unlink()
    assert loop.run(config(stopped, token_folder)).finished
    assert f"{stopped}: resumes after step 4 of {STEPS}" in capsys.readouterr().err
    np.testing.assert_array_equal(losses(stopped), losses(undisturbed))
    assert weights(stopped) == weights(undisturbed)


def test_two_damaged_checkpoints_are_both_named(undisturbed, stopped, token_folder, capsys):
    for step in (4, 6):
        flip_bit(find(stopped / "checkpoints" / str(step), CHUNK))
    assert loop.run(config(stopped, token_folder)).finished
    err = capsys.readouterr().err
    assert err.count("is damaged (") == 2
    assert f"{stopped}: resumes after step 2 of {STEPS}" in err
    np.testing.assert_array_equal(losses(stopped), losses(undisturbed))


@pytest.fixture
def finished(undisturbed, tmp_path):
    """The folder of the same run, which is finished."""
    return shutil.copytree(undisturbed, tmp_path / "run")


def test_a_finished_run_whose_last_checkpoint_is_damaged_computes_it_again(
    undisturbed, finished, token_folder, capsys
):
    flip_bit(finished / "checkpoints" / str(STEPS) / "manifest.json")
    assert loop.run(config(finished, token_folder)).finished
    err = capsys.readouterr().err
    assert f"checkpoints/{STEPS} is damaged (the checksum of manifest.json differs)" in err
    assert f"{finished}: resumes after step 6 of {STEPS}" in err
    np.testing.assert_array_equal(losses(finished), losses(undisturbed))
    assert weights(finished) == weights(undisturbed)


def test_a_finished_run_removes_what_a_killed_one_left_behind(finished, token_folder, capsys):
    """An incomplete folder, and the checkpoints that the last one supersedes."""
    (finished / "checkpoints" / "7" / "model").mkdir(parents=True)
    run = config(finished, token_folder)
    run = replace(run, checkpoint=replace(run.checkpoint, keep=2))
    assert loop.run(run).finished
    assert "is finished: 8 steps are done" in capsys.readouterr().err
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["6", "8"]


def test_a_finished_run_with_another_configuration_removes_nothing(finished, token_folder):
    (finished / "checkpoints" / "7" / "model").mkdir(parents=True)
    run = config(finished, token_folder)
    with pytest.raises(InputError, match="was trained with"):
        loop.run(replace(run, data=replace(run.data, seed=1)))
    assert (finished / "checkpoints" / "7").exists()


def test_a_run_can_stop_at_a_damaged_checkpoint(stopped, token_folder, tmp_path, capsys):
    chunk = find(stopped / "checkpoints" / "6", CHUNK)
    flip_bit(chunk)
    path = tmp_path / "run.yaml"
    path.write_text(yaml_file.dump(config(stopped, token_folder)))
    before = {p: p.read_bytes() for p in (stopped / "checkpoints").rglob("*") if p.is_file()}
    code, _, err = command(capsys, "train", path, "checkpoint.on_damage=stop")
    assert code == 2
    assert f"{stopped}/checkpoints/6 is damaged or cut short (" in err
    assert "Traceback" not in err
    after = {p: p.read_bytes() for p in (stopped / "checkpoints").rglob("*") if p.is_file()}
    assert after == before


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(
    stopped, token_folder, tmp_path, capsys
):
    for step in (2, 4, 6):
        flip_bit(find(stopped / "checkpoints" / str(step), CHUNK))
    path = tmp_path / "run.yaml"
    path.write_text(yaml_file.dump(config(stopped, token_folder)))
    code, _, err = command(capsys, "train", path)
    assert code == 2
    assert f"{stopped}/checkpoints/2 is damaged or cut short (" in err


def test_a_fault_of_the_machine_does_not_select_an_older_checkpoint(
    stopped, token_folder, monkeypatch
):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")

    monkeypatch.setattr(training_checkpoints, "load_items", fail)
    with pytest.raises((Fault, jax.errors.JaxRuntimeError), match="Out of memory"):
        loop.run(config(stopped, token_folder))
