"""The watchdog: a host that is stopped and a step that hangs end the run, and are named."""

import json
import signal

import pytest
from processes import Group
from test_hosts import TWO_DEVICES, config, write_config

from llama_jax.training import watchdog
from llama_jax.training.watchdog import STALLED

# The command line, with a watchdog that is as patient as a test. A host may never enter step 7, in
# whose collectives the other one then hangs.
PROGRAM = """
import sys, time
from llama_jax.cli import main as cli
from llama_jax.training import loop, watchdog

watchdog.ASK_SECONDS, watchdog.ANSWER_SECONDS, watchdog.STEP_SECONDS = 2, 4, {step_seconds}
watchdog.MEASURED_STEPS = 2
compile_step = loop.compile_step
def compile_step_that_hangs(*args):
    compute = compile_step(*args)
    def hang(*state):
        while state[3] == 6:
            time.sleep(1)
        return compute(*state)
    return hang
if sys.argv[-1] == "{hangs}":
    loop.compile_step = compile_step_that_hangs
sys.exit(cli.main(sys.argv[1:]))
"""


def start(tmp_path, data, step_seconds, hangs=None):
    settings = config(tmp_path / "run", data, TWO_DEVICES, steps=100_000, watchdog=10.0)
    path = write_config(tmp_path / "run.yaml", settings)
    program = PROGRAM.format(step_seconds=step_seconds, hangs=hangs)
    return Group(tmp_path / "output", 2, "train", path, program=("-c", program), devices=2)


def events(run):
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def state(step, stage, at="train (llama_jax/data/batches.py:7)"):
    return {"progress": [step, stage], "at": at}


@pytest.mark.parametrize(
    ("states", "text"),
    [
        (
            [state(8, 2), state(8, 0), state(8, 1)],
            "host 1 (node) reads the batch of step 8, and 2 other host(s) wait for it in step 8: it"
            " is in train (llama_jax/data/batches.py:7)",
        ),
        (
            [state(9, 0), state(8, 1)],
            "host 1 (node) dispatches step 8, and 1 other host(s) wait for it in step 9: it is in"
            " train (llama_jax/data/batches.py:7)",
        ),
        (
            [state(8, 2, "step (llama_jax/training/report.py:9)")] * 2,
            "all 2 hosts have dispatched step 8, and the devices don't end it: a collective or a"
            " device hangs (step (llama_jax/training/report.py:9))",
        ),
        (
            [state(8, 0)],
            "host 0 (node) reads the batch of step 8: it is in train (llama_jax/data/batches.py:7)",
        ),
    ],
)
def test_the_host_that_is_behind_is_named(states, text, monkeypatch):
    monkeypatch.setattr(watchdog.hosts, "name", "host {} (node)".format)
    expected = f"no step has ended for 200 s: {text}"
    assert watchdog._describe_hang(dict(enumerate(states)), 200.0) == expected


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_host_is_named(stopped, tmp_path, token_folder, other_token_folder):
    group = start(tmp_path, token_folder, 1000)
    group.wait_for_step(tmp_path / "run", 5)
    group.send_signal(stopped, signal.SIGSTOP)
    other = 1 - stopped
    group.wait_until_ended(other)
    group.send_signal(stopped, signal.SIGKILL)
    codes = group.wait()
    assert codes[other] == STALLED, group.outputs("err")
    last = group.outputs("err")[other].splitlines()[-1]
    assert last.startswith(f"llama-jax: host {stopped} (")
    assert "does not answer: stopped (SIGSTOP, a frozen machine)" in last
    stacks = tmp_path / "run" / "stacks" / f"host{other}.txt"
    assert "Thread 0x" in stacks.read_text()


@pytest.mark.slow
def test_a_host_that_never_enters_a_collective_is_named(tmp_path, token_folder, other_token_folder):
    group = start(tmp_path, token_folder, 8, hangs=1)
    assert group.wait() == [STALLED, STALLED], group.outputs("err")
    for err in group.outputs("err"):
        last = err.splitlines()[-1]
        assert "no step has ended for " in last
        assert "host 1 (" in last
        assert "dispatches step 7, and 1 other host(s) wait for it" in last
    (event,) = events(tmp_path / "run")
    assert (event["event"], event["hosts"]) == ("stalled", [])
    for host in (0, 1):
        assert "Thread 0x" in (tmp_path / "run" / "stacks" / f"host{host}.txt").read_text()
    assert "in hang" in (tmp_path / "run" / "stacks" / "host1.txt").read_text()
