"""A spike is recorded as it was, and a run that skips or rewinds stays deterministic."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import peer, run, tiny_config
from object_store import store_of_this_process
from poison import poison
from processes import Group
from test_ledger import KilledError

from llama_jax.config import yaml_file
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import (
    CheckpointConfig,
    DataConfig,
    LocalCheckpointConfig,
    LoggingConfig,
)
from llama_jax.data.batches import Batches
from llama_jax.data.samples import Samples
from llama_jax.errors import InputError
from llama_jax.runtime.manifest import read_manifest
from llama_jax.runtime.storage import parse_path
from llama_jax.training import flight_recorder, loop, replay, spike_limits
from llama_jax.training.events import read_events
from llama_jax.training.flight_recorder import FlightRecorder
from llama_jax.training.ledger import read_sessions
from llama_jax.training.metrics import read_metrics

# The command line, with the patches of `small`.
POISONED = """
import sys
from types import SimpleNamespace
from llama_jax.cli.main import main
from llama_jax.training import spike_limits, flight_recorder
from poison import poison

spike_limits.MIN_STEPS, flight_recorder.LEFT_OUT_STEPS = 8, 4
poison(SimpleNamespace(setattr=setattr), {13})
sys.exit(main(sys.argv[1:]))
"""

STEPS, EVERY, SPIKE = 20, 8, 14  # the batch of step 14 is poisoned; the last checkpoint is 8


@pytest.fixture(autouse=True, scope="module")
def small():
    """Spikes are found from step 10 on; all runs share one compiled step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spike_limits, "MIN_STEPS", 8)
        patch.setattr(flight_recorder, "LEFT_OUT_STEPS", 4)
        compile_step, compiled = loop.compile_step, {}

        def compile_once(config, data, state):
            if config.optimizer not in compiled:
                compiled[config.optimizer] = compile_step(config, data, state)
            return compiled[config.optimizer]

        for module in (loop, replay):
            patch.setattr(module, "compile_step", compile_once)
        poison(patch, {SPIKE - 1})
        yield


def config_of(out, data, on_spike, **training):
    config = tiny_config(
        **({"out": str(out), "steps": STEPS, "eval_every": 0, "on_spike": on_spike} | training)
    )
    return replace(
        config,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        data=DataConfig(mixture={str(data): 1.0}, batch_size=8, seq_len=16),
        optimizer=replace(config.optimizer, peak_lr=1e-3),
        checkpoint=CheckpointConfig(every=EVERY, keep=5),
        logging=LoggingConfig(progress=False, tensorboard=False),
    )


def metrics_of(folder):
    """Returns loss, gradient norm and `skipped` of each step; each must be there once, in order."""
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    return [(r["loss"], r["grad_norm"], r["skipped"]) for r in records]


def fingerprints(folder):
    return read_manifest(folder / "checkpoints" / str(STEPS))["fingerprints"]


@pytest.fixture(scope="module")
def runs(token_folder, tmp_path_factory):
    """The folders of complete runs, by `on_spike`; in 'off' nothing is a spike."""
    folder = tmp_path_factory.mktemp("spikes")
    for name in ("record", "skip", "rewind"):
        assert loop.run(config_of(folder / name, token_folder, name)).finished
    off = config_of(folder / "off", token_folder, "rewind", spike_threshold=0)
    assert loop.run(off).finished
    return folder


def test_a_recorded_spike_is_that_step_and_changes_nothing(runs, token_folder):
    assert metrics_of(runs / "record") == metrics_of(runs / "off")
    assert fingerprints(runs / "record") == fingerprints(runs / "off")
    assert not (runs / "off" / "events.jsonl").exists()
    [event] = read_events(runs / "record", "spike")
    assert (event["step"], event["text"].startswith("step 14: the gradient norm is ")) == (
        SPIKE,
        True,
    )
    [path] = (runs / "record" / "spikes").iterdir()
    found = json.loads(path.read_text())
    again = replay.replay(config_of(runs / "record", token_folder, "record"), SPIKE)
    assert again.equal
    assert found["norms"] == again.norms
    assert found["rows"] == [row._asdict() for row in again.rows]
    assert (found["loss"], found["grad_norm"]) == (again.loss, again.grad_norm)
    assert found["grad_norm"] > found["limits"]["grad_norm"]


def test_a_skipped_spike_changes_no_weights(runs, token_folder):
    skipped, off = metrics_of(runs / "skip"), metrics_of(runs / "off")
    assert [step for step, (*_, skip) in enumerate(skipped, 1) if skip] == [SPIKE]
    assert skipped[: SPIKE - 1] == off[: SPIKE - 1]
    assert skipped[SPIKE - 1][:2] == off[SPIKE - 1][:2]
    assert skipped[SPIKE] != off[SPIKE]
    # A replay skips it too.
    assert replay.replay(config_of(runs / "skip", token_folder, "skip"), SPIKE + 1).equal


def test_a_rewind_gives_the_run_that_never_had_these_batches(
    runs, token_folder, tmp_path, monkeypatch
):
    [event] = read_events(runs / "rewind", "rewind")
    assert (event["step"], event["to"], event["left_out"]) == (SPIKE, EVERY, [11, 14])
    numbers = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, *range(14, 40)]
    with monkeypatch.context() as patch:
        patch.setattr(Samples, "batch_number", lambda _, step: numbers[step])
        loop.run(config_of(tmp_path / "other", token_folder, "rewind"))
    assert not (tmp_path / "other" / "events.jsonl").exists()
    assert metrics_of(tmp_path / "other") == metrics_of(runs / "rewind")
    assert fingerprints(tmp_path / "other") == fingerprints(runs / "rewind")
    assert metrics_of(runs / "rewind")[:10] == metrics_of(runs / "off")[:10]
    [session] = read_sessions(runs / "rewind")
    assert session.seconds["repeating"] > 0
    found = replay.replay(config_of(runs / "rewind", token_folder, "rewind"), 13)
    assert (found.equal, found.batch, found.start) == (True, 17, EVERY)


def kill(patch, at):
    """Ends a process before or after it records a rewind, or at the n-th time it reads a step."""
    record, read, reads = FlightRecorder._record_event, Batches.train, Counter()

    def record_or_die(recorder, event, text):
        if (event["event"], at) == ("rewind", "before its event"):
            raise KilledError
        record(recorder, event, text)
        if (event["event"], at) == ("rewind", "after its event"):
            raise KilledError

    def read_or_die(data, step):
        reads[step] += 1
        if (step, reads[step]) == at:
            raise KilledError
        return read(data, step)

    patch.setattr(FlightRecorder, "_record_event", record_or_die)
    patch.setattr(Batches, "train", read_or_die)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "at",
    [
        "before its event",
        pytest.param("after its event", marks=SLOW),
        pytest.param((10, 2), marks=SLOW),
        (16, 1),
    ],
    ids=str,
)
def test_a_run_that_is_killed_at_or_after_a_rewind_resumes_bit_for_bit(
    at, runs, token_folder, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    config = config_of(folder, token_folder, "rewind")
    # The local checkpoints 9 and 12 must not outlive the rewind to 8.
    local = LocalCheckpointConfig(path=str(tmp_path / "local"), every=3)
    config = replace(config, checkpoint=replace(config.checkpoint, local=local))
    with monkeypatch.context() as patch:
        kill(patch, at)
        with pytest.raises(KilledError):
            loop.run(config)
    assert len(read_events(folder, "rewind")) == (at != "before its event")
    assert loop.run(config).finished
    assert metrics_of(folder) == metrics_of(runs / "rewind")
    assert fingerprints(folder) == fingerprints(runs / "rewind")
    assert len(read_events(folder, "rewind")) == 1


@pytest.mark.slow
def test_two_processes_rewind_together(runs, token_folder, tmp_path):
    config = config_of(tmp_path / "run", token_folder, "rewind")
    path = tmp_path / "run.yaml"
    path.write_text(yaml_file.dump(replace(config, mesh=MeshConfig(fsdp=2))))
    group = Group(tmp_path / "output", 2, "train", path, program=("-c", POISONED), devices=2)
    assert group.wait() == [0, 0], group.outputs("err")
    ours, alone = metrics_of(tmp_path / "run"), metrics_of(runs / "rewind")
    np.testing.assert_allclose(ours, alone, rtol=1e-4)  # sums of the hosts in another order
    [event] = read_events(tmp_path / "run", "rewind")
    assert (event["to"], event["left_out"]) == (EVERY, [11, 14])
    found, expected = (
        json.loads((folder / "spikes" / "14.json").read_text())["rows"]
        for folder in (tmp_path / "run", runs / "rewind")
    )
    for row, other in zip(found, expected, strict=True):
        assert row == other | {"loss": pytest.approx(other["loss"], rel=1e-4)}


@pytest.mark.slow
def test_a_run_in_a_bucket_records_its_spike_and_rewinds(runs, token_folder, capsys):
    peer("moto")
    with store_of_this_process("s3") as store:
        folder = parse_path(store.url("spikes"))
        config = config_of(folder, token_folder, "rewind")
        assert loop.run(config).finished
        assert metrics_of(folder) == metrics_of(runs / "rewind")
        assert fingerprints(folder) == fingerprints(runs / "rewind")
        found, expected = (
            json.loads((parent / "spikes" / "14.json").read_text()) | {"time": None}
            for parent in (folder, runs / "rewind")
        )
        assert found == expected
        code, out, err = run(capsys, "info", folder, "--spike", SPIKE)
        assert (code, out.count("══ row ")) == (0, 4), err
        extended = replace(config, training=replace(config.training, steps=STEPS + 1))
        assert loop.run(extended).finished  # from the events in the bucket
        assert len(read_events(folder, "rewind")) == 1


@pytest.mark.parametrize(
    ("on_spike", "sentence"),
    [
        ("rewind", "step 10 is a spike, and 3 rewinds to step 8, which left out ever more batches"),
        ("skip", "or was a spike, in 3 steps in a row, up to step 16"),
    ],
)
def test_a_run_whose_every_step_is_a_spike_ends(
    on_spike, sentence, token_folder, tmp_path, monkeypatch
):
    poison(monkeypatch, range(SPIKE - 1, 1000))
    config = config_of(tmp_path / "run", token_folder, on_spike, max_skipped=3)
    with pytest.raises(loop.RunStopped, match=sentence):
        loop.run(config)
    rewinds = read_events(tmp_path / "run", "rewind")
    assert len(rewinds) == (3 if on_spike == "rewind" else 0)
    if rewinds:
        assert {p.name for p in (tmp_path / "run" / "spikes").iterdir()} == {
            "14.json", "11.json", "10.json", "10-2.json"
        }  # fmt: skip
        with pytest.raises(loop.RunStopped, match=sentence):  # a scheduler that restarts it
            loop.run(config)
        assert read_events(tmp_path / "run", "rewind") == rewinds


def test_a_gradient_that_is_not_finite_is_recorded_and_skipped(token_folder, tmp_path):
    config = config_of(tmp_path / "run", token_folder, "record", max_skipped=2)
    config = replace(config, optimizer=replace(config.optimizer, peak_lr=1e38))
    with pytest.raises(loop.RunStopped, match="the gradient was not finite in 2 steps in a row"):
        loop.run(config)
    [path] = (tmp_path / "run" / "spikes").iterdir()  # the second one follows at once
    found = json.loads(path.read_text())
    assert found["grad_norm"] is None
    assert None in found["norms"]["gradients"]["layers.wq"]


def test_a_run_without_its_events_does_not_resume(runs, token_folder, tmp_path):
    folder = shutil.copytree(runs / "rewind", tmp_path / "run")
    (folder / "events.jsonl").unlink()
    with pytest.raises(
        InputError, match=r"was trained without batches 11-14, but its events\.jsonl"
    ):
        loop.run(config_of(folder, token_folder, "rewind", steps=STEPS + 1))


def test_the_command_shows_the_spike_and_the_picture_marks_it(runs, tmp_path, capsys):
    code, out, _ = run(capsys, "info", runs / "rewind", "--spike", SPIKE)
    assert code == 0
    assert "spike in step 14, batch 14 (on_spike: rewind)" in out
    assert "output RMS" in out
    assert out.count("══ row ") == 4
    code, out, _ = run(capsys, "info", runs / "rewind", "--picture", tmp_path / "run.svg")
    assert "spikes      1, the last in step 14; 1 rewind (info --spike STEP shows one)" in out
    assert "<!-- rewind -->" in (tmp_path / "run.svg").read_text()
    for folder, name, sentence in (
        (runs / "rewind", "3", "has no record of it; there are 14"),
        (runs / "off", "3", "no step of it was a spike"),
        (tmp_path, "3", "--spike shows a spike of a run"),
    ):
        code, _, err = run(capsys, "info", folder, "--spike", name)
        assert (code, sentence in err) == (2, True), err
