"""Runs in buckets, against stores on the loopback interface."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import ROOT, mesh_of, peer, run, tiny_config, tiny_model
from object_store import store_of_this_process

from llama_jax.config import yaml_file
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import DataConfig
from llama_jax.data import shards
from llama_jax.data.batches import Batches
from llama_jax.data.shard_writer import EncodedSpan, SplitWriter
from llama_jax.errors import Fault
from llama_jax.runtime import folder_lock
from llama_jax.runtime.storage import parse_path, remove_tree, write_file
from llama_jax.training import loop
from llama_jax.training.metrics import read_metrics

N_TOKENS = 1 << 21  # in 64 chunks, so that most rows need a request


@pytest.fixture(scope="module")
def store():
    """S3; `tests/runtime/test_storage.py` also uses Google's emulator, which is too slow here."""
    peer("moto")
    with store_of_this_process("s3") as running:
        yield running


@pytest.mark.slow
def test_killed_runs_in_a_faulty_bucket_equal_an_undisturbed_run():
    peer("moto")
    command = [sys.executable, "benchmarks/kills.py", "--kills", "2", "--steps", "30"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills of 1 process(es)" in done.stdout


@pytest.mark.slow
def test_a_replaced_run_stops_before_its_next_step(store, token_folder, monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.1)
    out, read = parse_path(store.url("replaced")), Batches.train

    def read_and_replace(data, step):
        if step == 3:
            (out / ".lock").write_text("that of another run")
            time.sleep(2)
        return read(data, step)

    monkeypatch.setattr(Batches, "train", read_and_replace)
    config = tiny_config(out=str(out), steps=20, eval_every=0)
    config = replace(config, data=replace(config.data, mixture={str(token_folder): 1.0}))
    with pytest.raises(Fault, match=r"another run has taken over .*: this one stops"):
        loop.run(config)
    steps = [record["step"] for record in read_metrics(out / "metrics.jsonl")]
    assert max(steps) <= 4
    assert not (out / "checkpoints").is_dir()


def write_random_tokens(folder, token_folder):
    """Writes token shards of random tokens, and returns their folder."""
    write_file(folder / "tokenizer.model", (token_folder / "tokenizer.model").read_bytes())
    writers = {split: SplitWriter(folder / split, 320) for split in ("train", "validation")}
    ids = np.random.default_rng(0).integers(3, 320, N_TOKENS, np.int32)
    for split, n in (("train", N_TOKENS), ("validation", 1000)):
        writers[split].append(EncodedSpan(ids[:n], n, split, True, True))
    tokenizer = folder / "tokenizer.model"
    shards.write_meta(folder, sources=["x"], tokenizer=tokenizer, n_vocab=320, writers=writers)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "bucket"])
def test_a_shard_that_is_cut_short_while_training_reads_it_is_named(
    where, store, token_folder, tmp_path, monkeypatch, capsys
):
    tokens = tmp_path / "cut" if where == "local" else parse_path(store.url("cut"))
    write_random_tokens(tokens, token_folder)
    shard, read = tokens / "train" / "tokens" / "c" / "0", Batches.train

    def read_and_cut(data, step):
        if step == 3:
            shard.write_bytes(shard.read_bytes()[: N_TOKENS // 2])
        return read(data, step)

    monkeypatch.setattr(Batches, "train", read_and_cut)
    config = tiny_config(tiny_model(n_layers=1), out=str(tmp_path / "run"), steps=200, eval_every=0)
    config = replace(config, data=replace(config.data, mixture={str(tokens): 1.0}))
    (tmp_path / "run.yaml").write_text(yaml_file.dump(config))
    code, _, err = run(capsys, "train", tmp_path / "run.yaml", "logging.progress=false")
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith(f"llama-jax train: {tokens} is damaged or cut short (")
    assert "train/tokens/c/0" in last
    assert last.endswith("): put a copy in its place, or create it again")


@pytest.mark.slow
def test_a_step_never_waits_for_a_distant_bucket(store, token_folder):
    config = DataConfig(
        mixture={str(write_random_tokens(parse_path(store.url("long")), token_folder)): 1.0},
        batch_size=4,
        seq_len=1024,
    )
    with jax.set_mesh(mesh_of((1, 1, 1))):
        data = Batches(config)
        store.faults.requests.clear()
        store.faults.latency = 0.05
        ahead, ready, blocked = [], [], []
        for step in range(20):
            reads = data.samples._ahead.get(step, {})
            ahead.append(sum(len(rows) for rows in data.samples._ahead.values()))
            ready.append(all(read.done() for read in reads.values()))
            start = time.monotonic()
            data.train(step)
            blocked.append(time.monotonic() - start)
            time.sleep(0.2)  # the devices compute the step
        store.faults.latency = 0.0
    # The chunks were really fetched, each by its range of bytes.
    gets = [path for method, path in store.faults.requests if method == "GET"]
    assert len([path for path in gets if "/c/" in path or "%2Fc%2F" in path]) > 20
    assert ahead[1:] == [3 * 4] * 19  # the rows of a step are requested three steps before
    # A busy machine may delay the store, which is written in Python.
    assert sum(ready[5:]) >= 12, blocked
    assert np.median(blocked[5:]) < 0.02, blocked


@pytest.mark.slow
def test_a_bucket_contains_everything_from_texts_to_a_converted_model(
    store, token_folder, tmp_path, capsys
):
    peer("s3fs")
    url = store.url
    for i, path in enumerate(sorted(token_folder.parent.glob("*.txt"))):
        parse_path(url(f"texts/{i:02d}.txt")).write_bytes(path.read_bytes())
    options = ["--vocab-size", "320", "--validation-fraction", "0.1"]
    code, out, err = run(capsys, "tokenize", url("texts"), "--out", url("tokens"), *options)
    assert code == 0, err
    assert f"{url('tokens')}/train: " in out

    def train(out, data, *options):
        config = tiny_config(out=str(out), steps=6, eval_every=0, eval_batches=1)
        # Few objects: each array is in at most four shards.
        config = replace(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
        (tmp_path / "run.yaml").write_text(yaml_file.dump(config).replace("nowhere:", f"{data}:"))
        overrides = ["checkpoint.every=2", "logging.progress=false", "logging.tensorboard=false"]
        code, text, err = run(capsys, "train", tmp_path / "run.yaml", *overrides, *options)
        assert code == 0, err
        return text + err

    train(url("run"), url("tokens"))
    remove_tree(parse_path(url("run/checkpoints/6")))  # as if it had been killed
    assert "resumes after step 4 of 6" in train(url("run"), url("tokens"))
    replayed = train(url("run"), url("tokens"), "--replay", 5, "--rows", 0)
    assert "step 5, computed from checkpoint 4" in replayed
    assert "equal to metrics.jsonl bit for bit" in replayed
    train(tmp_path / "local", url("tokens"))
    records = [
        read_metrics(f / "metrics.jsonl") for f in (parse_path(url("run")), tmp_path / "local")
    ]
    ours, theirs = ([r["loss"] for r in found if "loss" in r] for found in records)
    assert ours == theirs
    for source, target in (("run", "model"), ("model", "hf")):
        to = ["--to", "hf"] if target == "hf" else []
        code, _, err = run(capsys, "convert", url(source), url(target), *to)
        assert code == 0, err
    texts = []
    for folder in (url("run"), url("model"), tmp_path / "local"):
        code, text, err = run(capsys, "generate", folder, "--prompt", "a", "--max-new-tokens", "8")
        assert code == 0, err
        texts.append(text)
    assert texts[0] == texts[1] == texts[2]
    for folder in ("run", "model", "tokens"):
        code, out, err = run(capsys, "info", url(folder), "--verify")
        assert code == 0, err
        assert ": verified, " in out
        assert run(capsys, "info", url(folder))[0] == 0
