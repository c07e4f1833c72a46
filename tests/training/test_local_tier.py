"""Hosts die, and the run resumes from the newest local checkpoints that all hosts can restore."""

import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
from conftest import peer
from object_store import running_store
from processes import Group
from test_hosts import STEPS, config, losses, write_config

from llama_jax.checkpoint.training_checkpoints import TrainingCheckpoints
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import CheckpointConfig
from llama_jax.runtime import bucket_path
from llama_jax.runtime.storage import parse_path
from llama_jax.training import loop

# The command line. Host 1 dies after step 8, when all hosts have saved. Host 0 starts to write each
# shared checkpoint later than host 1.
DIES = """
import os, signal, sys, time
from llama_jax.checkpoint.local_checkpoints import LocalCheckpoints
from llama_jax.checkpoint.training_checkpoints import TrainingCheckpoints
from llama_jax.cli import main as cli
from llama_jax.runtime import hosts

shared = []
store = TrainingCheckpoints._store
def store_late(checkpoints, *state):
    shared.append(checkpoints)
    if sys.argv[-1] == "0":
        time.sleep(0.5)
    store(checkpoints, *state)
TrainingCheckpoints._store = store_late

save = LocalCheckpoints.save
def save_and_die(checkpoints, progress, *state):
    save(checkpoints, progress, *state)
    if progress.step == 8:
        checkpoints.wait()
        shared[0].wait()
        hosts.check_equal_on_hosts({})
        if sys.argv[-1] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
LocalCheckpoints.save = save_and_die
sys.exit(cli.main(sys.argv[1:]))
"""

# A device on each of two or four hosts. With `data` each shard is on two hosts.
REPLICATED, SPLIT, REPLICATED_ON_FOUR = (
    MeshConfig(data=2),
    MeshConfig(fsdp=2),
    MeshConfig(data=2, fsdp=2),
)


def settings(folder, tokens, disk, mesh=REPLICATED):
    """Shared checkpoints after steps 5 and 10, local ones after the even steps."""
    local = {"path": str(disk), "every": 2}
    checkpoint = CheckpointConfig(every=5, keep=5, local=local)
    return replace(config(folder, tokens), checkpoint=checkpoint, mesh=mesh)


def host_folders(disk):
    (run,) = disk.iterdir()
    return {int(path.name): path for path in run.iterdir()}


@pytest.fixture(scope="module")
def killed(tmp_path_factory, token_folder, other_token_folder):
    """Returns a function: the folder and configuration file of a run that died after step 8.

    Calls with the same arguments return the same run, in the state in which it died.
    """
    copies = {}

    def die(mesh, processes=2, out=None):
        if (mesh, processes) in copies:
            folder, copy = copies[mesh, processes]
            shutil.rmtree(folder)
            shutil.copytree(copy, folder)
            return folder, folder / "run.yaml"
        folder = tmp_path_factory.mktemp("killed")
        out = out or folder / "run"
        run = settings(out, token_folder, folder / "disk", mesh)
        path = write_config(folder / "run.yaml", run)
        program, devices = ("-c", DIES), processes
        group = Group(folder / "died", processes, "train", path, program=program, devices=devices)
        codes = [1] * processes
        codes[1] = -signal.SIGKILL
        assert group.wait() == codes, group.outputs("err")
        assert TrainingCheckpoints(out / "checkpoints").steps == [5]
        copies[mesh, processes] = folder, shutil.copytree(folder, f"{folder}-copy")
        return folder, path

    return die


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, token_folder, other_token_folder):
    """The losses of a run of one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    loop.run(config(folder / "run", token_folder))
    return losses(folder / "run")


def resume(folder, path, processes=2):
    """Resumes the run; returns the standard error of host 0."""
    group = Group(folder / "resumed", processes, "train", path, devices=processes)
    assert group.wait() == [0] * processes, group.outputs("err")
    assert group.outputs("err")[1:] == [""] * (processes - 1)
    assert not list((folder / "disk").iterdir())  # a finished run needs no local checkpoints
    return group.outputs("err")[0]


@pytest.mark.slow
def test_a_killed_run_resumes_from_the_local_checkpoints(killed, undisturbed):
    folder, path = killed(REPLICATED)
    before = losses(folder / "run")
    assert {*host_folders(folder / "disk")} == {0, 1}
    err = resume(folder, path)
    assert "restored the local checkpoints of step 8 in " in err
    assert "; replicas" not in err
    assert f"resumes after step 8 of {STEPS}" in err
    np.testing.assert_array_equal(losses(folder / "run")[: len(before)], before)
    np.testing.assert_allclose(losses(folder / "run"), undisturbed, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 1])
def test_a_host_without_local_checkpoints_is_filled_from_its_replica(killed, undisturbed, host):
    folder, path = killed(REPLICATED)
    shutil.rmtree(host_folders(folder / "disk")[host])
    err = resume(folder, path)
    assert f"; replicas filled host {host}\n" in err
    assert f"resumes after step 8 of {STEPS}" in err
    np.testing.assert_allclose(losses(folder / "run"), undisturbed, rtol=1e-5)


@pytest.mark.slow
def test_without_a_replica_the_run_resumes_from_the_shared_checkpoint(killed, undisturbed):
    folder, path = killed(SPLIT)
    shutil.rmtree(host_folders(folder / "disk")[1])
    err = resume(folder, path)
    assert "can't restore the local checkpoints of step 8 (host 1 has none, and not every" in err
    assert f"resumes after step 5 of {STEPS}" in err
    np.testing.assert_allclose(losses(folder / "run"), undisturbed, rtol=1e-5)


@pytest.mark.slow
def test_of_four_hosts_of_a_run_in_a_bucket_one_is_filled_from_its_replica(
    killed, undisturbed, monkeypatch
):
    peer("moto")
    with running_store("s3") as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        bucket_path.open_bucket.cache_clear()
        out = parse_path(store.url("run"))
        folder, path = killed(REPLICATED_ON_FOUR, processes=4, out=out)
        shutil.rmtree(host_folders(folder / "disk")[2])
        err = resume(folder, path, processes=4)
        assert "; replicas filled host 2\n" in err
        assert f"resumes after step 8 of {STEPS}" in err
        np.testing.assert_allclose(losses(out), undisturbed, rtol=1e-5)
