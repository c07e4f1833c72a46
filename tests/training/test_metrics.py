"""The records of a run: metrics.jsonl and Weights & Biases."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import tiny_config

from llama_jax.config.run import LoggingConfig
from llama_jax.errors import Fault
from llama_jax.training.metrics import MetricsLog, read_metrics


def config(**logging):
    return replace(tiny_config(), logging=LoggingConfig(tensorboard=False, **logging))


def test_metrics_that_cannot_be_written_are_a_fault(tmp_path):
    log = MetricsLog(tmp_path, config(), 0)
    log._file.close()
    log._file = open("/dev/full", "w")  # noqa: SIM115 (`log` closes it)
    with pytest.raises(Fault, match=r"can't write .*metrics.jsonl \(No space left on device\)"):
        log.write(1, {"loss": 1.0})
    log.close()


def test_a_full_disk_under_tensorboard_is_a_fault(tmp_path):
    log = MetricsLog(tmp_path, tiny_config(), 0)
    log.write(1, {"loss": 1.0})
    record_writer = log._tensorboard._writer._py_recordio_writer
    record_writer._writer.close()
    with open("/dev/full", "wb", buffering=0) as full:
        record_writer._writer = full
        # SummaryWriter's thread ends here, and the eleventh scalar blocks for ever.
        with pytest.raises(Fault, match=r"can't write .*tensorboard \(No space left on device\)"):
            log.write(2, {f"metric {i}": 1.0 for i in range(50)})
        log.close()


def test_two_folders_of_the_same_name_are_two_runs_at_wandb(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **run: runs.append(run)))
    for parent in ("a", "b", "a"):  # the run in `a` is resumed
        folder = tmp_path / parent / "run"
        folder.mkdir(parents=True, exist_ok=True)
        MetricsLog(folder, config(wandb="mine"), 0).close()
    ids = [run["id"] for run in runs]
    assert [run["name"] for run in runs] == ["run"] * 3
    assert ids[0] == ids[2] != ids[1]


def test_an_incomplete_last_line_of_the_metrics_is_ignored(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
