"""Several processes on this machine train one run, over the loopback interface."""

import shutil
import signal
import time

import numpy as np
import pytest
from conftest import tiny_model
from processes import Group

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
from llama_jax.training import loop
from llama_jax.training.metrics import read_metrics

STEPS, ROWS = 12, 8
EIGHT_DEVICES, TWO_DEVICES = MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=2)

# The command line, which also prints the training windows that this process reads.
RECORDING = """
import sys
from llama_jax.cli.main import main
from llama_jax.data.windows import Windows

read = Windows.__getitem__
def recorded(self, index):
    if self.tokens.split == "train":
        # In one piece: several threads read.
        sys.stdout.write(f"window {index} {self.tokens.folder}\\n")
        sys.stdout.flush()
    return read(self, index)
Windows.__getitem__ = recorded
sys.exit(main(sys.argv[1:]))
"""


# The command line; on host 1 the compilation of the step never ends, outside of Python.
COMPILING = """
import ctypes, sys
from llama_jax.cli import main as cli
from llama_jax.training import loop

def compile_forever(*_):
    print("compiles", flush=True)
    lock = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(lock)
if sys.argv[-1] == "1":
    loop.compile_step = compile_forever
sys.exit(cli.main(sys.argv[1:]))
"""

# The command line; on host 1 the second save finds a full disk.
FULL = """
import sys
from llama_jax.cli import main as cli
from llama_jax.checkpoint import array_files
from llama_jax.checkpoint.training_checkpoints import TrainingCheckpoints

def write(*_):
    raise OSError(27, "File too large")

save = TrainingCheckpoints.save
def full(checkpoints, progress, *state):
    if progress.step == 8:
        array_files.write_shards = write
    save(checkpoints, progress, *state)
if sys.argv[-1] == "1":
    TrainingCheckpoints.save = full
sys.exit(cli.main(sys.argv[1:]))
"""


def config(folder, data, mesh=EIGHT_DEVICES, **training):
    values = {"out": str(folder), "steps": STEPS, "eval_every": 0, "eval_batches": 2}
    return Config(
        model=tiny_model(),
        mesh=mesh,
        data=DataConfig(
            mixture={str(data): 0.5, str(data.with_name("other")): 0.5}, batch_size=ROWS, seq_len=16
        ),
        optimizer=OptimizerConfig(warmup_steps=4, peak_lr=1e-2),
        training=TrainingConfig(**(values | training)),
        checkpoint=CheckpointConfig(every=4, keep=5),
        logging=LoggingConfig(progress=True, tensorboard=False),
    )


def write_config(path, settings):
    path.write_text(yaml_file.dump(settings))
    return path


def losses(run):
    """Returns the loss of each step; each must be in the file once, in order."""
    records = [r for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    return np.array([r["loss"] for r in records])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, other_token_folder):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def alone(runs, token_folder):
    """The folder of a run of one process."""
    loop.run(config(runs / "alone", token_folder))
    return runs / "alone"


@pytest.fixture(scope="module")
def two(alone, runs, token_folder):
    """Two processes that train from the first step to the last."""
    path = write_config(runs / "two.yaml", config(runs / "two", token_folder))
    group = Group(runs / "two-output", 2, "train", path, program=("-c", RECORDING))
    assert group.wait() == [0, 0], group.outputs("err")
    return group


@pytest.fixture(scope="module")
def four(alone, runs, token_folder):
    """Four processes, of which the last gets SIGTERM."""
    path = write_config(runs / "four.yaml", config(runs / "four", token_folder))
    group = Group(runs / "four-output", 4, "train", path)
    group.wait_for_step(runs / "four", 2)
    group.send_signal(3, signal.SIGTERM)
    assert group.wait() == [0, 0, 0, 0], group.outputs("err")
    return group


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(two, alone, runs):
    np.testing.assert_allclose(losses(runs / "two"), losses(alone), rtol=1e-5)
    ours, theirs = (read_metrics(run / "metrics.jsonl") for run in (runs / "two", alone))
    names = {name for r in theirs for name in r if "loss" in name}
    assert len(names) == 6  # of all rows and of each of the two sources, in training and held out
    for name in names:
        values = [[r[name] for r in rs if name in r] for rs in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=1e-5)


@pytest.mark.slow
def test_each_host_reads_only_its_own_rows(two):
    read = [
        {line for line in output.splitlines() if line.startswith("window ")}
        for output in two.outputs("out")
    ]
    assert [len(windows) for windows in read] == [STEPS * ROWS // 2] * 2
    assert read[0].isdisjoint(read[1])


@pytest.mark.slow
def test_only_host_0_prints_and_writes(two, alone, runs):
    (out, quiet_out), (err, quiet) = two.outputs("out"), two.outputs("err")
    assert "on 8 cpu device(s) of 2 hosts (data 2 × fsdp 2 × " in err
    assert f"step {STEPS}/{STEPS}" in err
    assert "validation loss" in out
    assert quiet == ""
    assert "loss" not in quiet_out
    names = [{p.name for p in run.iterdir()} for run in (runs / "two", alone)]
    assert names[0] == names[1]


@pytest.mark.slow
def test_two_processes_compute_a_step_again(two, runs):
    path = runs / "two.yaml"
    group = Group(runs / "replay-output", 2, "train", path, "--replay", STEPS - 1, "--rows", 1)
    assert group.wait() == [0, 0], group.outputs("err")
    out, quiet = group.outputs("out")
    assert f"step {STEPS - 1}, computed from checkpoint 8\n" in out
    assert "equal to metrics.jsonl bit for bit" in out
    assert out.count("══ row ") == 1
    assert "loss" not in quiet


@pytest.mark.slow
def test_sigterm_on_any_host_saves_the_same_step_on_all(four, alone, runs):
    step = len(losses(runs / "four"))
    assert 2 <= step < STEPS
    assert TrainingCheckpoints(runs / "four" / "checkpoints").steps[-1] == step
    err = four.outputs("err")[0]
    assert "stopping on SIGTERM on host 3" in err
    assert f"saved after step {step}; continue with: llama-jax train" in err
    np.testing.assert_allclose(losses(runs / "four"), losses(alone)[:step], rtol=1e-5)


@pytest.mark.slow
def test_one_process_resumes_a_checkpoint_of_four(four, alone, runs, token_folder):
    shutil.copytree(runs / "four", runs / "one")
    assert loop.run(config(runs / "one", token_folder)).finished
    np.testing.assert_allclose(losses(runs / "one"), losses(alone), rtol=1e-5)


@pytest.mark.slow
def test_two_processes_resume_a_checkpoint_of_four_also_after_a_kill(
    four, alone, runs, token_folder
):
    run = runs / "killed"
    shutil.copytree(runs / "four", run)
    path = write_config(runs / "killed.yaml", config(run, token_folder, TWO_DEVICES))
    group = Group(runs / "killed-output", 2, "train", path, devices=2)
    group.wait_for_step(run, STEPS - 3)
    group.send_signal(1, signal.SIGKILL)
    start = time.monotonic()
    assert group.wait(60) == [1, -signal.SIGKILL]
    assert time.monotonic() - start < 20
    last = group.outputs("err")[0].splitlines()[-1]
    assert last.startswith("llama-jax: host 1 (")
    assert "has died or can't be reached" in last
    before_kill = losses(run)
    again = Group(runs / "again-output", 2, "train", path, devices=2)
    assert again.wait() == [0, 0], again.outputs("err")
    resumed = losses(run)
    np.testing.assert_array_equal(resumed[: len(before_kill)], before_kill)  # bit for bit
    np.testing.assert_allclose(resumed, losses(alone), rtol=1e-5)


@pytest.mark.slow
def test_sigterm_before_the_first_step_ends_all_with_0(runs, token_folder):
    path = write_config(runs / "early.yaml", config(runs / "early", token_folder, TWO_DEVICES))
    group = Group(runs / "early-output", 2, "train", path, program=("-c", COMPILING), devices=2)
    group.wait_until(lambda: "compiles" in group.outputs("out")[1])
    group.send_signal(1, signal.SIGTERM)
    assert group.wait(60) == [0, 0], group.outputs("err")
    for err in group.outputs("err"):
        last = err.splitlines()[-1]
        assert last.startswith("llama-jax: host 1 (")
        assert "stopped on SIGTERM: there was nothing to save; start again with: " in last
        assert "Traceback" not in err
    assert TrainingCheckpoints(runs / "early" / "checkpoints").steps == []


@pytest.mark.slow
def test_a_failed_save_on_one_host_ends_all_with_its_message(alone, runs, token_folder):
    run = runs / "full"
    path = write_config(runs / "full.yaml", config(run, token_folder, TWO_DEVICES))
    group = Group(runs / "full-output", 2, "train", path, program=("-c", FULL), devices=2)
    assert group.wait(120) == [1, 1], group.outputs("err")
    for err in group.outputs("err"):
        last = [line for line in err.splitlines() if line.startswith("llama-jax: ")][-1]
        assert last.startswith("llama-jax: host 1 (")
        assert f"can't save step 8 in {run / 'checkpoints'} (" in last
        assert "File too large): the checkpoints of steps 4 are unchanged; fix the cause" in last
        assert "Traceback" not in err
    again = Group(runs / "full-again-output", 2, "train", path, devices=2)
    assert again.wait() == [0, 0], again.outputs("err")
    assert "resumes after step 4 of 12" in again.outputs("err")[0]
    np.testing.assert_allclose(losses(run), losses(alone), rtol=1e-5)


def test_the_key_on_which_hosts_disagree_is_reported(runs, token_folder):
    path = write_config(runs / "apart.yaml", config(runs / "apart", token_folder))
    overrides = [["training.steps=5"], ["training.steps=6"]]
    group = Group(runs / "apart-output", 2, "train", path, own_arguments=overrides)
    assert group.wait() == [2, 2]
    for err in group.outputs("err"):
        assert "training.steps is 5 on host 0, but 6 on host 1 (" in err
        assert "Traceback" not in err
    assert not (runs / "apart").exists()
