"""Hosts detect their cluster, join each other, and end together with one message."""

import re
import signal
import socket
import subprocess
import time
from collections import Counter

import pytest
import yaml
from conftest import ROOT
from hostile_peers import HostilePeers
from processes import Group

from llama_jax.cli.main import main
from llama_jax.config import yaml_file
from llama_jax.errors import InputError
from llama_jax.runtime import hosts

# A program instead of the training: after joining, it fails or waits as its argument states.
PROGRAM = """
import sys, time
from llama_jax.runtime import hosts
from llama_jax.errors import InputError

action, (_, address, _, processes, _, process) = sys.argv[1], sys.argv[2:]
with hosts.join(address, int(processes), int(process)):
    hosts.check_equal_on_hosts({})
    print("joined", flush=True)
    if action == "input":
        raise InputError("this is wrong")
    if action == "bug":
        raise RuntimeError("a bug")
    time.sleep(100)
"""


@pytest.mark.parametrize(
    ("action", "code", "message"),
    [
        ("input", 2, "host 1 ({name}): this is wrong"),
        ("bug", 1, "host 1 ({name}): RuntimeError: a bug"),
    ],
)
def test_an_error_on_one_host_ends_all_with_its_message(
    action, code, message, tmp_path, monkeypatch
):
    monkeypatch.setenv(hosts.JOB_TOKEN, "known to all three")
    actions = [["wait"], [action], ["wait"]]
    group = Group(tmp_path / "output", 3, program=("-c", PROGRAM), own_arguments=actions)
    with HostilePeers(group.port, 10):
        assert group.wait(60) == [code] * 3
    expected = "llama-jax: " + message.format(name=socket.gethostname())
    for i, err in enumerate(group.outputs("err")):
        assert err.splitlines()[-1] == expected
        assert ("Traceback" in err) == (action == "bug" and i == 1)


def test_the_death_of_host_0_is_reported_too(tmp_path):
    group = Group(tmp_path / "output", 3, "wait", program=("-c", PROGRAM))
    deadline = time.monotonic() + 60
    while "joined\n" * 3 not in "".join(group.outputs("out")):
        assert time.monotonic() < deadline, group.outputs("err")
        time.sleep(0.05)
    group.send_signal(0, signal.SIGKILL)
    codes = group.wait(60)
    for code, err in zip(codes[1:], group.outputs("err")[1:], strict=True):
        assert f"llama-jax: host 0 ({socket.gethostname()}) has died" in err, err
        assert code in (1, -signal.SIGABRT)  # JAX may abort before the process exits


SLURM = {"JOB_ID": "9", "STEP_NODELIST": "n[1-4]", "NTASKS": "4", "PROCID": "3", "LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "cluster"),
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
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that is a single process
    ],
)
def test_only_an_environment_of_several_processes_is_joined(monkeypatch, environment, cluster):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts._detect_cluster() == cluster


def test_processes_are_numbered_across_tpu_slices(monkeypatch):
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
    assert hosts._detect_cluster() == ("localhost:8482", 4, 3)


def test_an_open_mpi_without_an_address_is_an_error(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="Open MPI started 2 processes, but gives no address"):
        hosts._detect_cluster()


def test_the_job_token_is_the_secret_or_the_schedulers_name_of_the_job(monkeypatch):
    assert hosts._job_token("n1:61449", detected=False) == b""  # flags may name host 0 differently
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert hosts._job_token("n1:61449", detected=True) == b"n1:61449 9 1"
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1314521088.0;tcp://10.96.0.1:34911")
    assert hosts._job_token("10.96.0.1:62880", detected=True) == b"10.96.0.1:62880"
    monkeypatch.setenv(hosts.JOB_TOKEN, "0123456789abcdef")
    for detected in (True, False):
        assert hosts._job_token("n1:61449", detected) == b"0123456789abcdef"


def test_a_job_token_that_can_be_guessed_is_refused(monkeypatch, capsys):
    monkeypatch.setenv(hosts.JOB_TOKEN, "")  # as after a failed command
    flags = ["--coordinator", "127.0.0.1:1", "--processes", "2", "--process", "1"]
    assert main(["train", "no.yaml", *flags]) == 2
    assert "LLAMA_JAX_JOB_TOKEN has 0 characters: set it on all" in capsys.readouterr().err


def test_the_recipes_for_pods_are_well_formed():
    text = (ROOT / "docs" / "pods.md").read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)
    kinds = Counter(kind for kind, _ in blocks)
    assert kinds == {"bash": 8, "yaml": 2, "dockerfile": 1}
    scripts = [block for kind, block in blocks if kind == "bash"]
    checkpoint, jobset = [yaml.safe_load(block) for kind, block in blocks if kind == "yaml"]
    assert set(checkpoint["checkpoint"]) == {"every", "local"}
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    for script in [*scripts, *pod["containers"][0]["args"]]:
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr
    overrides = re.findall(r"'?((?:data|mesh|model|training)\.\w+=(?:[^\s'`{]+|{[^}]*}))", text)
    assert len(overrides) >= 10
    yaml_file.load(ROOT / "configs" / "llama-7b.yaml", overrides)
