"""Traces of steps: those of the configuration, and those that SIGUSR1 requests."""

import os
import signal
from dataclasses import replace

import pytest
from conftest import run, tiny_config

from llama_jax.config import yaml_file
from llama_jax.config.run import CheckpointConfig, DataConfig, LoggingConfig
from llama_jax.training import loop, profile


def config(folder, data, **training):
    return replace(
        tiny_config(out=str(folder), steps=6, eval_every=0, eval_batches=1, **training),
        data=DataConfig(mixture={str(data): 1.0}, batch_size=8, seq_len=16),
        checkpoint=CheckpointConfig(every=6),
        logging=LoggingConfig(progress=False, tensorboard=False),
    )


@pytest.fixture
def traced(monkeypatch):
    """The first and the last step of each trace; the step counts when it is dispatched."""
    steps, started, read = [], [], loop.Batches.train
    start, stop = profile.jax.profiler.start_trace, profile.jax.profiler.stop_trace
    current = [0]

    def train(data, step):
        current[0] = step + 1
        return read(data, step)

    def start_trace(folder):
        started.append(current[0] + 1)  # before the batch of its first step is read
        start(folder)

    def stop_trace():
        steps.append((started.pop(), current[0]))
        stop()

    monkeypatch.setattr(loop.Batches, "train", train)
    monkeypatch.setattr(profile.jax.profiler, "start_trace", start_trace)
    monkeypatch.setattr(profile.jax.profiler, "stop_trace", stop_trace)
    return steps


def test_the_steps_of_the_configuration_are_traced(token_folder, tmp_path, traced, capsys):
    assert loop.run(config(tmp_path / "run", token_folder, profile=(2, 4))).finished
    assert traced == [(2, 4)]
    names = {path.name.partition(".")[2] for path in (tmp_path / "run/profile").rglob("*.*")}
    assert {"trace.json.gz", "xplane.pb"} <= names
    assert f"the profile is in {tmp_path}/run/profile" in capsys.readouterr().err


def test_sigusr1_traces_the_next_steps_and_the_end_of_the_run_ends_the_trace(
    token_folder, tmp_path, traced, monkeypatch
):
    read = loop.Batches.train

    def train(data, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        return read(data, step)

    monkeypatch.setattr(loop.Batches, "train", train)
    before = signal.getsignal(signal.SIGUSR1)
    assert loop.run(config(tmp_path / "run", token_folder)).finished
    assert traced == [(6, 6)]
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize("steps", ["[4, 2]", "[2, 7]", "[0, 2]"])
def test_steps_that_do_not_exist_are_refused(steps, token_folder, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml_file.dump(config(tmp_path / "run", token_folder)))
    code, _, err = run(capsys, "train", path, f"training.profile={steps}")
    assert code == 2
    assert "profile" in err
    assert not (tmp_path / "run").exists()
