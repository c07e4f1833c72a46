"""A run whose mixture changes at a step: planned from the start, or while the run is stopped."""

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from conftest import tiny_config

from llama_jax.config.data import Source
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
)
from llama_jax.data import tokenize
from llama_jax.data.batches import ORDER
from llama_jax.errors import InputError
from llama_jax.runtime.manifest import read_manifest, write_manifest
from llama_jax.training import loop
from llama_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def sources(token_folder, tmp_path_factory):
    """Two folders of token shards with one tokenizer and different texts."""
    other = tmp_path_factory.mktemp("other") / "tokens"
    tokenize.tokenize_corpus(
        [str(token_folder.parent / "[0-3]*.txt")], other,
        tokenizer=str(token_folder / "tokenizer.model"), validation_fraction=0.1, progress=False,
    )  # fmt: skip
    return str(token_folder), str(other)


def mixed(folder, sources, steps, phases=None, weights=(0.75, 0.25)):
    return replace(
        tiny_config(out=str(folder), steps=steps, eval_every=0, eval_batches=1),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        data=DataConfig(
            mixture=dict(zip(sources, weights, strict=True)), phases=phases or {}, batch_size=8,
            seq_len=16,
        ),
        optimizer=OptimizerConfig(schedule="wsd", warmup_steps=2, peak_lr=1e-2),
        checkpoint=CheckpointConfig(every=4, keep=3),
        logging=LoggingConfig(progress=False, tensorboard=False),
    )  # fmt: skip


def losses(folder):
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def planned(sources, tmp_path_factory):
    """A run of 12 steps whose mixture changes after 6, 8 and 10."""
    folder = tmp_path_factory.mktemp("runs") / "planned"
    loop.run(mixed(folder, sources, 12, phases(sources)))
    return folder


def phases(sources):
    first, second = sources
    return {6: {second: 1.0}, 8: {second: 0.5, first: 0.5}, 10: {first: 1.0}}


def test_phases_that_are_added_on_resume_equal_phases_planned_from_the_start(
    planned, sources, tmp_path, capsys
):
    folder, all_phases = tmp_path / "run", phases(sources)
    loop.run(mixed(folder, sources, 8, {6: all_phases[6]}))
    loop.run(mixed(folder, sources, 12, all_phases, weights=(3.0, 1.0)))  # the same shares
    assert losses(folder) == losses(planned)
    status = capsys.readouterr().err
    assert f"{folder}: data.phases changes from " in status
    assert f"after step 10 the mixture is {sources[0]} 1" in status
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    for event in events:
        assert abs(datetime.now(UTC) - datetime.fromisoformat(event.pop("time"))) < timedelta(
            hours=1
        )
    by_key = {event["key"]: event for event in events}
    assert by_key.keys() == {"data.mixture", "data.phases", "training.steps"}
    assert by_key["data.phases"] == {
        "step": 8, "event": "changed", "key": "data.phases",
        "from": {"6": all_phases[6]}, "to": {str(s): m for s, m in all_phases.items()},
    }  # fmt: skip
    assert not (planned / "events.jsonl").exists()


def test_the_mixture_of_the_steps_done_can_not_change(planned, sources, capsys):
    before = (planned / "config.yaml").read_bytes()
    past = phases(sources)
    for changed in (
        mixed(planned, sources, 20, past, weights=(0.7, 0.3)),
        mixed(planned, sources, 20, past | {5: {sources[0]: 1.0}}),
        mixed(planned, sources, 20, past | {11: {sources[1]: 1.0}}),
        mixed(planned, sources, 20, {6: past[6], 8: past[8]}),
    ):
        with pytest.raises(InputError, match="with other shares of its sources in the first 12"):
            loop.run(changed)
    swapped = dict(zip(reversed(sources), (0.75, 0.25), strict=True))
    changed = mixed(planned, sources, 20, past)
    with pytest.raises(InputError, match="with other shares"):
        loop.run(replace(changed, data=replace(changed.data, mixture=swapped)))
    assert (planned / "config.yaml").read_bytes() == before


def test_a_run_that_began_with_another_order_of_its_windows_does_not_resume(
    planned, sources, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(planned, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        found = read_manifest(checkpoint)
        assert found["data"][0] == ORDER
        # As before this entry existed.
        write_manifest(checkpoint, found | {"data": found["data"][1:]})
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(
        InputError, match="by an earlier version of llama_jax, which reads the same"
    ):
        loop.run(mixed(folder, sources, 20, phases(sources)))
    assert (folder / "metrics.jsonl").read_bytes() == before
    # A finished run has nothing to read.
    assert loop.run(mixed(folder, sources, 12, phases(sources))).finished


def test_a_run_that_needs_more_epochs_than_allowed_does_not_start(sources, tmp_path):
    limited = Source(weight=0.25, max_epochs=0.01)
    with pytest.raises(
        InputError, match=r"is read 0\.\d\d times in this run, and its max_epochs is"
    ):
        loop.run(mixed(tmp_path / "run", sources, 8, weights=(0.75, limited)))
    assert not (tmp_path / "run/config.yaml").exists()
