"""Several processes train as one, and end as one: real processes, over the loopback."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import yaml
from conftest import ROOT, tiny_model

from llama_jax import config_file, distributed, star
from llama_jax.checkpoint import TrainingCheckpoints
from llama_jax.cli import main
from llama_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
)
from llama_jax.errors import InputError
from llama_jax.training import loop, run_folder
from llama_jax.training.metrics import read_metrics

STEPS, ROWS = 12, 8

# The command line, which also notes the windows of the training text that this process reads.
RECORDING = """
import sys
from llama_jax.cli import main
from llama_jax.data import batches

read = batches.Windows.__getitem__
def noted(self, index):
    if "train" in str(self.tokens._tokens[0].filename):
        print("window", index, flush=True)
    return read(self, index)
batches.Windows.__getitem__ = noted
sys.exit(main(sys.argv[1:]))
"""


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


class Group:
    """Processes that train together, each with an equal part of 8 simulated devices."""

    def __init__(self, folder, processes, *argv, program=("-m", "llama_jax"), apart=()):
        folder.mkdir()
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        environment |= {"JAX_NUM_CPU_DEVICES": str(8 // processes)}
        environment |= {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        environment |= {
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"
        }  # what compiles sooner runs long enough
        self.folder = folder
        self.processes = []
        port = free_port()
        for i in range(processes):
            own = apart[i] if apart else ()
            flags = ["--coordinator", f"127.0.0.1:{port}"]
            flags += ["--processes", str(processes), "--process", str(i)]
            with open(folder / f"out{i}", "w") as out, open(folder / f"err{i}", "w") as err:
                command = [sys.executable, *program, *map(str, argv), *own, *flags]
                self.processes.append(
                    subprocess.Popen(command, env=environment, stdout=out, stderr=err)
                )

    def said(self, name):
        return [(self.folder / f"{name}{i}").read_text() for i in range(len(self.processes))]

    def wait(self, seconds=150):
        """Returns the exit codes; kills what still runs after `seconds`."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.kill()
            pytest.fail(f"still running after {seconds} s: {self.said('err')}")

    def wait_for_step(self, run, step):
        deadline = time.monotonic() + 120
        while not any(r["step"] >= step for r in read_metrics(run / "metrics.jsonl")):
            codes = [process.poll() for process in self.processes]
            if any(code is not None for code in codes) or time.monotonic() > deadline:
                self.wait(0)
                pytest.fail(f"{codes}: {self.said('err')}")
            time.sleep(0.01)


def config(folder, data, **training):
    values = {"out": str(folder), "steps": STEPS, "eval_every": 0, "eval_batches": 2}
    return Config(
        model=tiny_model(),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        data=DataConfig(mixture={str(data): 1.0}, batch_size=ROWS, seq_len=16),
        optimizer=OptimizerConfig(warmup_steps=4, peak_lr=1e-2),
        training=TrainingConfig(**(values | training)),
        checkpoint=CheckpointConfig(every=4, keep=5),
        logging=LoggingConfig(progress=True, tensorboard=False),
    )


def written(path, settings):
    path.write_text(config_file.dump(settings))
    return path


def losses(run):
    """Returns the loss of every step, each of which must stand in the file once, in order."""
    records = [r for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    return np.array([r["loss"] for r in records])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def alone(runs, token_folder):
    """A run of one process."""
    loop.run(config(runs / "alone", token_folder))
    return runs / "alone"


@pytest.fixture(scope="module")
def two(alone, runs, token_folder):
    """Two processes, from the first step to the last."""
    path = written(runs / "two.yaml", config(runs / "two", token_folder))
    group = Group(runs / "two-said", 2, "train", path, program=("-c", RECORDING))
    assert group.wait() == [0, 0], group.said("err")
    return group


@pytest.fixture(scope="module")
def four(alone, runs, token_folder):
    """Four processes, the last of which is told to stop."""
    path = written(runs / "four.yaml", config(runs / "four", token_folder))
    group = Group(runs / "four-said", 4, "train", path)
    group.wait_for_step(runs / "four", 2)
    group.processes[3].send_signal(signal.SIGTERM)
    assert group.wait() == [0, 0, 0, 0], group.said("err")
    return group


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(two, alone, runs):
    np.testing.assert_allclose(losses(runs / "two"), losses(alone), rtol=1e-5)
    ours, theirs = (read_metrics(run / "metrics.jsonl") for run in (runs / "two", alone))
    validation = [
        [r["validation_loss"] for r in rs if "validation_loss" in r] for rs in (ours, theirs)
    ]
    np.testing.assert_allclose(*validation, rtol=1e-5)


@pytest.mark.slow
def test_each_host_reads_its_own_rows_alone(two):
    read = [
        {int(line.split()[1]) for line in said.splitlines() if line.startswith("window ")}
        for said in two.said("out")
    ]
    assert [len(windows) for windows in read] == [STEPS * ROWS // 2] * 2
    assert read[0].isdisjoint(read[1])


@pytest.mark.slow
def test_host_0_alone_speaks_and_writes(two, alone, runs):
    (out, quiet_out), (err, quiet) = two.said("out"), two.said("err")
    assert "on 8 cpu device(s) of 2 hosts (data 2 × fsdp 2 × " in err
    assert f"step {STEPS}/{STEPS}" in err
    assert "validation loss" in out
    assert quiet == ""
    assert "loss" not in quiet_out
    names = [{p.name for p in run.iterdir()} for run in (runs / "two", alone)]
    assert names[0] == names[1]


@pytest.mark.slow
def test_sigterm_on_any_host_saves_one_step_on_all(four, alone, runs):
    step = len(losses(runs / "four"))
    assert 2 <= step < STEPS
    assert TrainingCheckpoints(runs / "four" / "checkpoints").steps[-1] == step
    err = four.said("err")[0]
    assert "stopping on SIGTERM on host 3" in err
    assert f"saved after step {step}; go on with: llama-jax train" in err
    np.testing.assert_allclose(losses(runs / "four"), losses(alone)[:step], rtol=1e-5)


@pytest.mark.slow
def test_what_four_saved_one_continues(four, alone, runs, token_folder):
    shutil.copytree(runs / "four", runs / "one")
    assert loop.run(config(runs / "one", token_folder)).finished
    np.testing.assert_allclose(losses(runs / "one"), losses(alone), rtol=1e-5)


@pytest.mark.slow
def test_what_four_saved_two_continue_also_when_one_is_killed(four, alone, runs, token_folder):
    run = runs / "killed"
    shutil.copytree(runs / "four", run)
    path = written(runs / "killed.yaml", config(run, token_folder))
    group = Group(runs / "killed-said", 2, "train", path)
    group.wait_for_step(run, STEPS - 3)
    group.processes[1].kill()
    begun = time.monotonic()
    assert group.wait(60) == [1, -signal.SIGKILL]
    assert time.monotonic() - begun < 20
    last = group.said("err")[0].splitlines()[-1]
    assert last.startswith("llama-jax: host 1 (")
    assert "has died or can't be reached" in last
    before = losses(run)
    again = Group(runs / "again-said", 2, "train", path)
    assert again.wait() == [0, 0], again.said("err")
    resumed = losses(run)
    np.testing.assert_array_equal(resumed[: len(before)], before)  # bit for bit
    np.testing.assert_allclose(resumed, losses(alone), rtol=1e-5)


def test_hosts_that_disagree_on_the_configuration_are_told_the_key(runs, token_folder):
    path = written(runs / "apart.yaml", config(runs / "apart", token_folder))
    apart = [["training.steps=5"], ["training.steps=6"]]
    group = Group(runs / "apart-said", 2, "train", path, apart=apart)
    assert group.wait() == [2, 2]
    for said in group.said("err"):
        assert "training.steps is 5 on host 0, but 6 on host 1 (" in said
        assert "Traceback" not in said
    assert not (runs / "apart").exists()


# A program in place of the training: who has joined does what its argument says.
PROGRAM = """
import sys, time
from llama_jax import distributed
from llama_jax.errors import InputError

does, (_, where, _, processes, _, process) = sys.argv[1], sys.argv[2:]
with distributed.hosts(where, int(processes), int(process)):
    distributed.agreed({})
    print("joined", flush=True)
    if does == "input":
        raise InputError("this is wrong")
    if does == "bug":
        raise RuntimeError("nobody thought of this")
    time.sleep(100)
"""


@pytest.mark.parametrize(
    ("does", "code", "sentence"),
    [
        ("input", 2, "host 1 ({name}): this is wrong"),
        ("bug", 1, "host 1 ({name}): RuntimeError: nobody thought of this"),
    ],
)
def test_an_error_on_one_host_ends_all_with_its_sentence(does, code, sentence, tmp_path):
    apart = [["wait"], [does], ["wait"]]
    group = Group(tmp_path / "said", 3, program=("-c", PROGRAM), apart=apart)
    assert group.wait(60) == [code] * 3
    wanted = "llama-jax: " + sentence.format(name=socket.gethostname())
    for i, said in enumerate(group.said("err")):
        assert said.splitlines()[-1] == wanted
        assert ("Traceback" in said) == (does == "bug" and i == 1)


def test_the_death_of_host_0_is_told_too(tmp_path):
    group = Group(tmp_path / "said", 3, "wait", program=("-c", PROGRAM))
    deadline = time.monotonic() + 60
    while "joined\n" * 3 not in "".join(group.said("out")):
        assert time.monotonic() < deadline, group.said("err")
        time.sleep(0.05)
    group.processes[0].kill()
    codes = group.wait(60)
    for code, said in zip(codes[1:], group.said("err")[1:], strict=True):
        assert f"llama-jax: host 0 ({socket.gethostname()}) has died" in said, said
        assert code in (1, -signal.SIGABRT)  # JAX may abort before the process has gone


def gather(processes, **changes):
    """Lets processes that are threads meet; returns a star or an error of each."""
    port = free_port()
    given = [(changes.get(f"n{i}", processes), changes.get(f"i{i}", i)) for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        waiting = [pool.submit(star.meet, "127.0.0.1", port, n, i) for n, i in given]
        return [w.exception() or w.result()[0] for w in waiting]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n2": 4}, r"host 2 \(.*\) was started with --processes 4, host 0 with 3: start all"),
        ({"i2": 1}, r"two processes say that they are host 1 of 3 .*: number them from 0 to 2"),
    ],
)
def test_hosts_that_count_wrong_are_all_told(monkeypatch, changes, sentence):
    monkeypatch.setattr(star, "LATE_SECONDS", 0.5)
    for error in gather(3, **changes):
        with pytest.raises(InputError, match=sentence):
            raise error


def test_all_stop_before_the_same_step_whoever_wants_it_and_when():
    rng = random.Random(0)
    for _ in range(10):
        stars = gather(4)
        wanting, wanted_at = rng.randrange(4), rng.randrange(1, 20)
        sleeps = [random.Random(rng.random()) for _ in stars]
        # Like a device: a step ends when all have handed it over.
        steps = [threading.Barrier(4) for _ in range(60)]

        def run(i, stars=stars, sleeps=sleeps, steps=steps, wanting=wanting, at=wanted_at):
            for step in range(50):
                wish = "SIGTERM" if i == wanting and step >= at else None
                if why := stars[i].stop_before(step, wish):
                    assert why.startswith(f"SIGTERM on host {wanting} ")
                    return step
                time.sleep(sleeps[i].uniform(0, 0.002))
                steps[step].wait(10)
            return None

        with ThreadPoolExecutor(4) as pool:
            stopped = set(pool.map(run, range(4)))
        assert len(stopped) == 1
        assert wanted_at <= stopped.pop() <= wanted_at + 5
        for each in stars:
            each.leaving = True
        for each in stars:
            each.close()


def test_nobody_is_waited_for_for_ever(monkeypatch, capsys):
    monkeypatch.setattr(star, "JOIN_SECONDS", 0.5)
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "3", "--process"]
    for process, sentence in [
        ("0", "of 3 hosts 1 have come within 0 s: start also 1, 2, or look why they can't reach"),
        ("1", "can't reach host 0 at 127.0.0.1:"),
    ]:
        assert main(["train", "no.yaml", *flags, process]) == 2
        assert f"llama-jax train: {sentence}" in capsys.readouterr().err


def test_another_program_at_the_port_is_not_taken_for_host_0():
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        port = server.getsockname()[1]
        joining = pool.submit(star.meet, "127.0.0.1", port, 2, 1)
        connection = server.accept()[0]
        connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        with pytest.raises(InputError, match="does not answer as one of this run"):
            joining.result(10)
        connection.close()


SLURM = {"JOB_ID": "9", "STEP_NODELIST": "n[1-4]", "NTASKS": "4", "PROCID": "3", "LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({f"SLURM_{k}": v for k, v in SLURM.items()}, ("n1:61449", 4, 3)),
        ({f"SLURM_{k}": v for k, v in (SLURM | {"NTASKS": "1"}).items()}, None),
        (
            {
                "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.96.0.1,10.148.0.1:34911",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": "1",
            },
            ("10.96.0.1:62880", 2, 1),
        ),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that is alone
    ],
)
def test_only_an_environment_of_several_processes_is_joined(monkeypatch, environment, place):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed._detected() == place


def test_tpu_slices_are_numbered_through(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    for name, value in {
        "TPU_WORKER_HOSTNAMES": "localhost,b",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
    }.items():
        monkeypatch.setenv(name, value)
    assert distributed._detected() == ("localhost:8482", 4, 3)


def test_an_open_mpi_that_tells_no_address_is_no_single_process(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="Open MPI started 2 processes, but doesn't say where"):
        distributed._detected()


def test_a_run_folder_that_hosts_do_not_share_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(run_folder, "VISIBLE_SECONDS", 0.3)
    (tmp_path / ".lock").write_text("that of another run")
    with pytest.raises(InputError, match="is not that of host 0: training"):
        run_folder._check_shared(tmp_path, "this run")


def test_the_recipes_for_pods_are_well_formed():
    text = (ROOT / "docs" / "pods.md").read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)
    kinds = Counter(kind for kind, _ in blocks)
    assert kinds == {"bash": 8, "yaml": 1, "dockerfile": 1}
    scripts = [block for kind, block in blocks if kind == "bash"]
    (jobset,) = [yaml.safe_load(block) for kind, block in blocks if kind == "yaml"]
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    for script in [*scripts, *pod["containers"][0]["args"]]:
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr
    overrides = re.findall(r"'?((?:data|mesh|model|training)\.\w+=(?:[^\s'`{]+|{[^}]*}))", text)
    assert len(overrides) >= 10
    config_file.load(ROOT / "configs" / "llama-7b.yaml", overrides)
