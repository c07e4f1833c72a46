"""The ledger of a run: each second is assigned once, over all starts."""

import json
import time
from dataclasses import replace

import pytest
from conftest import run, tiny_config

from llama_jax.config.run import CheckpointConfig, DataConfig, LoggingConfig
from llama_jax.errors import Fault
from llama_jax.runtime.storage import write_file
from llama_jax.training import ledger, loop
from llama_jax.training.ledger import KINDS, Ledger, read_sessions, sum_sessions
from llama_jax.training.metrics import read_metrics

STEPS, EVERY, KILLED_AT = 30, 4, (6, 11, 18, 23, 27)


class Clock:
    """A clock that moves only when a test says so."""

    def __init__(self, monkeypatch):
        self.now, self.wrong = 1e9, 0  # `wrong`: how far the time of day is wrong
        monkeypatch.setattr(ledger.time, "time", lambda: self.now + self.wrong)
        monkeypatch.setattr(ledger.time, "monotonic", lambda: self.now)

    def add(self, seconds):
        self.now += seconds


def test_each_second_is_assigned_once_also_over_restarts(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    first = Ledger()
    clock.add(3)
    with first.during("compiling"):
        clock.add(5)
    first.open(tmp_path, 0, 0)
    for step in (1, 2, 3):
        first.enter_step(step)
        clock.add(10)
        first.end_step(step, waited=1.0)
    first.enter("saving")
    clock.add(2)
    first.write()
    clock.add(7)  # killed here: nobody knows how these seconds were spent
    clock.add(30)
    second = Ledger()
    second.open(tmp_path, 2, reached=3)
    for step in (3, 4):
        second.enter_step(step)
        clock.add(10)
        second.end_step(step, waited=0.0)
    assert second.goodput() == pytest.approx(37 / 97)
    second.close()
    sessions = read_sessions(tmp_path)
    assert [session.step for session in sessions] == [3, 4]
    assert sum_sessions(sessions) == pytest.approx(
        dict.fromkeys(KINDS, 0.0)
        | {"starting": 3, "compiling": 5, "training": 37, "waiting for data": 3}
        | {"saving": 2, "repeating": 10, "down": 37}
    )
    assert sum(sum_sessions(sessions).values()) == pytest.approx(97)


def test_a_clock_that_was_set_back_gives_no_negative_time_and_is_reported(
    tmp_path, monkeypatch, capsys
):
    clock = Clock(monkeypatch)
    for _ in range(2):
        current = Ledger()
        current.open(tmp_path, 0, 0)
        clock.add(5)
        current.close()
        clock.add(-3600)
    sums = sum_sessions(read_sessions(tmp_path))
    assert (sums["starting"], sums["down"]) == (10, 0)
    assert capsys.readouterr().err == (
        f"the clock of this machine is 3600 s behind the last record of {tmp_path}/ledger.jsonl: it"
        " was set back, or is not that of the last host; the time between the two starts counts as"
        " 0\n"
    )
    current = Ledger()
    current.open(tmp_path / "new", 0, 0)
    for wrong in (0, -3600, -3600, -3599, 1):
        clock.wrong = wrong
        clock.add(5)
        current.write()
    assert sum_sessions(read_sessions(tmp_path / "new"))["starting"] == 25
    sentence = "the clock of this machine was set {} by {} s: the times in metrics.jsonl follow it,"
    sentence += " the seconds in ledger.jsonl do not\n"
    assert capsys.readouterr().err == sentence.format("back", 3600) + sentence.format(
        "forward", 3600
    )


def test_a_ledger_that_cannot_be_written_is_a_fault(tmp_path, monkeypatch):
    current = Ledger()
    current.open(tmp_path, 0, 0)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger, "write_file", fail)
    with pytest.raises(Fault, match=r"can't write .*ledger.jsonl .*No space left"):
        current.write()
    current.close()  # after another error


class KilledError(Exception):
    """Stands for the end of the process."""


def run_until_killed(config, step, monkeypatch):
    """Runs until the loop asks for the batch of `step` (0 is the first)."""
    read = loop.Batches.train

    def die(data, number):
        if number == step:
            raise KilledError
        return read(data, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Batches, "train", die)
        with pytest.raises(KilledError):
            loop.run(config)


def test_the_ledger_of_a_run_with_five_restarts_adds_up(
    token_folder, tmp_path, monkeypatch, capsys
):
    config = replace(
        tiny_config(out=str(tmp_path / "run"), steps=STEPS, eval_every=10, eval_batches=1),
        data=DataConfig(mixture={str(token_folder): 1.0}, batch_size=8, seq_len=16),
        checkpoint=CheckpointConfig(every=EVERY, keep=2),
        logging=LoggingConfig(progress=False, tensorboard=False),
    )
    start, first_start = time.monotonic(), time.time()
    for step in KILLED_AT:
        run_until_killed(config, step, monkeypatch)
        time.sleep(0.2)  # the scheduler starts it again
    assert loop.run(config).finished
    wall = time.monotonic() - start
    folder = tmp_path / "run"
    sessions = read_sessions(folder)
    sums = sum_sessions(sessions)
    assert sum(sums.values()) == pytest.approx(wall, rel=0.01)
    assert abs(sessions[0].start - first_start) < 0.01 * wall
    # The metrics of the last step before a kill are not read yet.
    assert [session.step for session in sessions] == [*(step - 1 for step in KILLED_AT), STEPS]
    assert 1.0 <= sums["down"] < 0.5 * wall
    assert min(sums[kind] for kind in KINDS) >= 0
    # Each killed process had logged 1 or 2 steps after its last checkpoint.
    assert 0 < sums["repeating"] < sums["training"]
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "goodput" in r]
    goodput = records[-1]["goodput"]  # before the last validation and checkpoint
    later = sums["evaluating"] + sums["saving"]
    assert 0.9 * sums["training"] / wall < goodput <= sums["training"] / (wall - later)
    code, out, _ = run(capsys, "info", folder, "--picture")
    assert code == 0
    assert "since the first of 6 starts: " in out
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")
    times = [record["time"] for record in records]
    assert times == sorted(times)
    assert sessions[0].start < times[0] < times[-1] <= sessions[-1].end + 0.001


def test_the_file_has_a_line_for_each_start(tmp_path):
    write_file(
        tmp_path / "ledger.jsonl",
        b'{"start": "2026-11-01T12:00:00.000+00:00", "step": 7, "seconds": {"training": 3.5}}\n',
    )
    current = Ledger()
    current.open(tmp_path, 7, 7)
    current.close()
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {
        "start": "2026-11-01T12:00:00.000+00:00", "step": 7, "seconds": {"training": 3.5}
    }  # fmt: skip
    assert len(lines) == 2
