"""Which host delays the others, from the times that all hosts report."""

import json

import pytest
from processes import Group
from test_hosts import TWO_DEVICES, config, write_config

from llama_jax.training import host_times
from llama_jax.training.host_times import GATHER_STEPS, HostTimes
from llama_jax.training.metrics import read_metrics

# Seconds per step of each host: data, dispatch, other, waiting for its devices.
EVEN = [(0.01, 0.02, 0.01, 0.96)] * 3
BUSY = [(0.4, 0.02, 0.01, 0.57), *EVEN[1:]]  # its devices still compute longer than it needs
SLEEPY = [(0.01, 0.02, 0.01, 1.96), (0.01, 0.02, 0.01, 1.96), (1.01, 0.02, 0.96, 0.01)]

# The command line; host 1 sleeps a second before each batch.
ASLEEP = """
import sys, time
from llama_jax.cli import main as cli
from llama_jax.data.batches import Batches
from llama_jax.training import host_times

host_times.SLACK_SHARE = 0.5  # the devices of a busy machine are slow
read = Batches.train
def late(data, step):
    time.sleep(1)
    return read(data, step)
if sys.argv[-1] == "1":
    Batches.train = late
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def gathered(monkeypatch, tmp_path):
    """A function that gives host 0 the times of all hosts; returns the metrics and the events."""
    reports = []
    monkeypatch.setattr(host_times.hosts, "is_multi_host", lambda: True)
    monkeypatch.setattr(host_times.hosts, "count", lambda: 3)
    monkeypatch.setattr(host_times.hosts, "name", "host {} (node)".format)
    monkeypatch.setattr(host_times.hosts, "send_report", lambda content: None)
    monkeypatch.setattr(host_times.hosts, "take_reports", lambda: [reports.pop(0)])
    times = HostTimes(tmp_path)

    def gather(step, seconds):
        reports.extend((host, [step, *parts]) for host, parts in enumerate(seconds))
        while reports:
            times.gather(step + 1)
        path = tmp_path / "events.jsonl"
        return times.metrics, path.read_text().splitlines() if path.exists() else []

    return gather


def test_a_host_that_does_not_wait_for_its_devices_delays_the_others(gathered):
    metrics, events = gathered(20, EVEN)
    assert metrics["host_lag"] == 0
    assert events == []
    metrics, events = gathered(40, BUSY)
    assert (metrics["slowest_host"], metrics["host_lag"]) == (0, pytest.approx(0.39))
    assert events == []
    for step in (60, 80):
        metrics, events = gathered(step, SLEEPY)
        assert (metrics["slowest_host"], metrics["host_lag"]) == (2, pytest.approx(1.95))
        assert len(events) == 1  # the second time is no news
    event = json.loads(events[0])
    assert (event["step"], event["event"]) == (60, "slow host")
    assert (event["host"], event["seconds"]) == (2, 1.95)
    assert event["text"] == (
        "host 2 (node) delays each step by about 1.950 s of 2.000 s: data 1.010 s (others 0.010 s),"
        " dispatch 0.020 s (others 0.020 s), other 0.960 s (others 0.010 s)"
    )
    _, events = gathered(100, EVEN)
    assert json.loads(events[1])["text"] == "host 2 (node) no longer delays the steps"


@pytest.mark.slow
def test_a_host_that_sleeps_a_second_each_step_is_named(tmp_path, token_folder, other_token_folder):
    run = tmp_path / "run"
    settings = config(run, token_folder, TWO_DEVICES, steps=GATHER_STEPS + 2)
    path = write_config(tmp_path / "run.yaml", settings)
    group = Group(tmp_path / "output", 2, "train", path, program=("-c", ASLEEP), devices=2)
    assert group.wait() == [0, 0], group.outputs("err")
    (event,) = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["host"]) == ("slow host", 1)
    assert f"step {GATHER_STEPS}: host 1 (" in group.outputs("err")[0]
    (*_, last) = [r for r in read_metrics(run / "metrics.jsonl") if "host_lag" in r]
    assert last["slowest_host"] == 1
    assert last["host_lag"] > 0.9
