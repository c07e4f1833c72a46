"""A run that stops for any reason resumes with the same losses."""

import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest
from conftest import mesh_of, tiny_model

from llama_jax.checkpoint import training_checkpoints
from llama_jax.checkpoint.model_folders import manifest_of
from llama_jax.config import yaml_file
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.model import ModelConfig
from llama_jax.config.run import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainingConfig,
)
from llama_jax.data import tokenize
from llama_jax.data.batches import Batches
from llama_jax.data.shards import read_meta
from llama_jax.errors import Fault, InputError
from llama_jax.runtime.manifest import write_manifest
from llama_jax.tokenizer.export import huggingface_files
from llama_jax.tokenizer.tokenizer import load_tokenizer
from llama_jax.training import init_from, loop, start
from llama_jax.training.metrics import read_metrics

STEPS = 24


def config(folder, data, *, mesh=(2, 2, 2), peak_lr=1e-2, every=4, **training):
    return Config(
        model=tiny_model(),
        mesh=MeshConfig(data=mesh[0], fsdp=mesh[1], tensor=mesh[2]),
        data=DataConfig(mixture={str(data): 1.0}, batch_size=8, seq_len=16),
        optimizer=OptimizerConfig(warmup_steps=4, peak_lr=peak_lr),
        training=TrainingConfig(
            **({"out": str(folder), "steps": STEPS, "eval_every": 8, "eval_batches": 2} | training)
        ),
        checkpoint=CheckpointConfig(every=every, keep=2),
        logging=LoggingConfig(progress=False, tensorboard=False),
    )


def losses(folder):
    """Returns the loss of each step; each must be in the file once, in order."""
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    return np.array([r["loss"] for r in records])


@pytest.fixture(scope="module")
def full_run(token_folder, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("runs") / "full_run"
    outcome = loop.run(config(folder, token_folder))
    assert outcome.finished
    assert len(losses(folder)) == STEPS
    return folder


def test_the_loss_falls_and_the_run_folder_is_complete(full_run, token_folder):
    assert losses(full_run)[-4:].mean() < losses(full_run)[:4].mean() - 0.5
    assert {p.name for p in full_run.iterdir()} == {
        ".lock", "checkpoints", "config.yaml", "ledger.jsonl", "loss.png", "metrics.jsonl",
        "tokenizer.model",
    }  # fmt: skip
    assert yaml_file.load(full_run / "config.yaml") == config(full_run, token_folder)
    assert training_checkpoints.TrainingCheckpoints(full_run / "checkpoints").steps == [20, 24]
    records = read_metrics(full_run / "metrics.jsonl")
    assert [r["step"] for r in records if "validation_loss" in r] == [8, 16, 24]
    assert {"grad_norm", "learning_rate", "tokens_per_second", "step_seconds"} <= records[0].keys()
    assert records[-2]["tokens_seen"] == STEPS * 8 * 16
    assert (full_run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_that_is_started_again_writes_nothing(full_run, token_folder, capsys):
    before = {p: p.stat().st_mtime_ns for p in full_run.rglob("*") if p.name != ".lock"}
    outcome = loop.run(config(full_run, token_folder))
    assert outcome.finished
    assert (
        outcome.validation_loss == read_metrics(full_run / "metrics.jsonl")[-1]["validation_loss"]
    )
    assert {p: p.stat().st_mtime_ns for p in full_run.rglob("*") if p.name != ".lock"} == before
    assert "is finished: 24 steps are done" in capsys.readouterr().err
    (full_run / "loss.png").unlink()  # as if it had been killed after its last checkpoint
    loop.run(config(full_run, token_folder))
    assert {p for p in full_run.rglob("*") if p.name != ".lock"} == {*before}


def start_process(settings, tmp_path):
    """Starts the command line in another process, on 8 simulated devices."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml_file.dump(settings))
    command = [sys.executable, "-m", "llama_jax", "train", str(path)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_step(process, folder, step):
    deadline = time.monotonic() + 120
    while not any(r["step"] >= step for r in read_metrics(folder / "metrics.jsonl")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_any_moment_it_resumes_with_the_same_losses(
    seed, full_run, token_folder, tmp_path
):
    rng = random.Random(seed)
    folder = tmp_path / "run"
    process = start_process(config(folder, token_folder), tmp_path)
    # A random step and a random time after it: during a step, a save or a validation.
    wait_for_step(process, folder, rng.randrange(1, STEPS - 2))
    time.sleep(rng.uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "loss.png").exists()
    # Seed 0 resumes on another mesh, where sums are rounded in another order.
    mesh = (1, 2, 4) if seed == 0 else (2, 2, 2)
    assert loop.run(config(folder, token_folder, mesh=mesh)).finished
    if seed == 0:
        np.testing.assert_allclose(losses(folder), losses(full_run), rtol=1e-5)
    else:
        np.testing.assert_array_equal(losses(folder), losses(full_run))
    assert not list((folder / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_0(number, full_run, token_folder, tmp_path):
    folder = tmp_path / "run"
    settings = config(folder, token_folder, every=1000)
    process = start_process(settings, tmp_path)
    wait_for_step(process, folder, 3)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    step = training_checkpoints.TrainingCheckpoints(folder / "checkpoints").steps[-1]
    assert f"saved after step {step}; continue with: llama-jax train" in stderr
    assert len(losses(folder)) == step
    assert loop.run(settings).finished
    np.testing.assert_array_equal(losses(folder), losses(full_run))


def test_a_failed_save_ends_the_run_before_its_next_step(
    full_run, token_folder, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    settings = config(folder, token_folder, every=8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = training_checkpoints.TrainingCheckpoints.save

    def save_to_a_full_disk(checkpoints, progress, *state):
        if progress.step == 16:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        save(checkpoints, progress, *state)
        checkpoints._saving[1]._thread.join()

    monkeypatch.setattr(training_checkpoints.TrainingCheckpoints, "save", save_to_a_full_disk)
    try:
        with pytest.raises(Fault) as raised:
            loop.run(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(raised.value)
    assert message.startswith(f"can't save step 16 in {folder / 'checkpoints'} (")
    assert "File too large): the checkpoints of steps 8 are unchanged; fix the cause" in message
    assert len(losses(folder)) == 16
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["8"]
    monkeypatch.undo()
    assert loop.run(settings).finished
    np.testing.assert_array_equal(losses(folder), losses(full_run))


def test_a_missing_wandb_is_an_error_before_the_run_folder_exists(
    token_folder, tmp_path, monkeypatch
):
    settings = config(tmp_path / "run", token_folder)
    settings = replace(settings, logging=replace(settings.logging, wandb="mine"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"logging.wandb is mine, but the package wandb is not"):
        loop.run(settings)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_continues_with_more_steps(token_folder, tmp_path, capsys):
    folder = tmp_path / "run"
    loop.run(config(folder, token_folder, steps=4))
    outcome = loop.run(config(folder, token_folder, steps=6))
    assert outcome.step == 6
    status = capsys.readouterr().err
    assert "training.steps changes from 4 to 6" in status
    assert (
        "a cosine extends over all training.steps, now 6 instead of 4: the learning rate of step 5"
        " and later ones changes" in status
    )


def test_a_resumed_run_needs_no_init_from_folder(full_run, token_folder, tmp_path, capsys):
    folder = tmp_path / "run"
    loop.run(config(folder, token_folder, steps=2, init_from=str(full_run)))
    moved = config(folder, token_folder, steps=3, init_from=str(tmp_path / "elsewhere"))
    assert loop.run(moved).step == 3
    assert f"training.init_from changes from {full_run} to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peak_lr": 2e-2}, "was trained with optimizer.peak_lr = 0.01, and now it is 0.02"),
        ({"seed": 7}, "was trained with training.seed = 0, and now it is 7"),
    ],
)
def test_a_run_does_not_resume_with_another_configuration(full_run, token_folder, changes, message):
    with pytest.raises(InputError, match=message):
        loop.run(config(full_run, token_folder, **changes))


def test_a_run_does_not_resume_with_other_data(token_folder, tmp_path):
    folder = tmp_path / "run"
    loop.run(config(folder, token_folder, steps=2))
    other = tmp_path / "other"
    files = str(token_folder.parent / "[0-3]*.txt")
    tokenizer = str(token_folder / "tokenizer.model")
    tokenize.tokenize_corpus(
        [files], other, tokenizer=tokenizer, validation_fraction=0.1, progress=False
    )
    with pytest.raises(InputError, match="differ from those that the run"):
        loop.run(config(folder, other, steps=4))


def test_only_one_process_trains_in_a_folder(token_folder, tmp_path):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is training in"):
            loop.run(config(tmp_path, token_folder))


def test_a_run_starts_from_a_model_folder(full_run, token_folder, tmp_path):
    outcome = loop.run(
        config(tmp_path / "tuned", token_folder, steps=2, init_from=str(full_run), peak_lr=1e-6)
    )
    assert outcome.finished
    assert losses(tmp_path / "tuned")[0] < losses(full_run)[:4].mean() - 0.5


def test_init_from_must_have_the_model_of_the_run(full_run, token_folder, tmp_path, capsys):
    settings = config(tmp_path / "run", token_folder, init_from=str(full_run))
    other = replace(settings, model=tiny_model(hidden_dim=128))
    with pytest.raises(InputError, match=r"model.hidden_dim is 128, but the model in .* has 64"):
        loop.run(other)
    assert not (tmp_path / "run" / "config.yaml").exists()
    init_from.check_shape(replace(settings, model=tiny_model(rope_theta=5e5)))
    assert "rope_theta is 500000.0, but" in capsys.readouterr().err
    (tmp_path / "int8").mkdir()
    shape = {**asdict(tiny_model()), "quantized": "int8"}
    (tmp_path / "int8" / "config.json").write_text(json.dumps(shape))
    write_manifest(tmp_path / "int8", manifest_of(ModelConfig(**shape), {}, {}))
    with pytest.raises(InputError, match="are int8, for inference only"):
        init_from.check_shape(config(tmp_path, token_folder, init_from=str(tmp_path / "int8")))


def test_init_from_must_have_the_tokenizer_of_the_data(full_run, token_folder, tmp_path):
    texts = tmp_path / "texts.jsonl"
    lines = ({"text": f"{i} other words, of other letters: {'xyz' * i}"} for i in range(40))
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # The run tokenizes a corpus with the tokenizer of the model.
    settings = config(tmp_path / "run", tmp_path / "tokenized", init_from=str(full_run))
    start.prepare_data(replace(settings, data=replace(settings.data, corpus=(str(texts),))))
    hashes = [
        read_meta(folder)["tokenizer_sha256"] for folder in (tmp_path / "tokenized", token_folder)
    ]
    assert hashes[0] == hashes[1]
    tokenize.tokenize_corpus([str(texts)], tmp_path / "other", n_vocab=300, progress=False)
    with pytest.raises(InputError, match="was tokenized with another tokenizer than that of"):
        loop.run(config(tmp_path / "run", tmp_path / "other", init_from=str(full_run)))


def test_two_formats_of_one_tokenizer_are_equal(full_run, token_folder, tmp_path):
    """A tokenizer.json that was converted from a tokenizer.model gives the same tokens."""
    (tmp_path / "model").mkdir()
    files = huggingface_files(load_tokenizer(token_folder))
    (tmp_path / "model" / "tokenizer.json").write_bytes(files["tokenizer.json"])
    settings = config(tmp_path / "run", token_folder, init_from=str(tmp_path / "model"))
    with jax.set_mesh(mesh_of((8, 1, 1))):
        init_from.check_tokenizer(settings, Batches(settings.data))


def test_ten_gradients_in_a_row_that_are_not_finite_stop_the_run(token_folder, tmp_path):
    folder = tmp_path / "run"
    # This learning rate is too high for float32: after the first step the weights overflow.
    settings = config(folder, token_folder, peak_lr=1e38, every=1000)
    with pytest.raises(loop.RunStopped, match=r"not finite in 10 steps in a row, up to step (\d+)"):
        loop.run(settings)
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "skipped" in r]
    assert [r["skipped"] for r in records[-10:]] == [1] * 10
    assert records[-11]["skipped"] == 0
    assert records[-1]["grad_norm"] is None
    steps = training_checkpoints.TrainingCheckpoints(folder / "checkpoints").steps
    assert steps == [records[-1]["step"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": {"nowhere": 1.0}}, "no folder of token shards at nowhere: create it with"),
        ({"batch_size": 4}, r"data × fsdp \(8\) does not divide the 4 rows"),
    ],
)
def test_a_run_that_cannot_start_gives_the_reason(token_folder, tmp_path, changes, message):
    settings = config(tmp_path / "run", token_folder, mesh=(1, 8, 1))
    values = {"mixture": {str(token_folder): 1.0}, "batch_size": 8, "seq_len": 16} | changes
    with pytest.raises(InputError, match=message):
        loop.run(replace(settings, data=DataConfig(**values)))


def test_a_tokenizer_larger_than_the_model_is_refused(token_folder, tmp_path):
    settings = replace(config(tmp_path / "run", token_folder), model=tiny_model(vocab_size=256))
    with pytest.raises(InputError, match=r"has 320 tokens, but model.vocab_size is 256"):
        loop.run(settings)
