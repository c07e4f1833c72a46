"""`llama-jax info --verify` reads every byte; `info` names damaged and incomplete checkpoints."""

import os
import random
import shutil
import subprocess
import sys

import jax
import pytest
from conftest import mesh_of, run, tiny_config

from llama_jax.checkpoint.training_checkpoints import Progress, TrainingCheckpoints
from llama_jax.config import yaml_file
from llama_jax.config.run import CheckpointConfig
from llama_jax.data import shard_writer
from llama_jax.data.tokenize import tokenize_corpus
from llama_jax.training.step import init_state

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def original_run(token_folder, tmp_path_factory):
    """A run folder with checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with jax.set_mesh(mesh_of((1, 1, 1))):
        state = init_state(CONFIG, jax.random.key(0))
        checkpoints = TrainingCheckpoints(folder / "checkpoints", CheckpointConfig())
        for step in (1, 2, 3):
            checkpoints.save(Progress(step, ["a"]), *state)
        checkpoints.close()
    (folder / "config.yaml").write_text(yaml_file.dump(CONFIG))
    shutil.copy(token_folder / "tokenizer.model", folder)
    return folder


@pytest.fixture
def run_folder(original_run, tmp_path):
    return shutil.copytree(original_run, tmp_path / "run")


def flip_bit(path, seed=0):
    rng, data = random.Random(seed), bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def exchange_chunks(array, first, second):
    """Exchanges two chunks of an array; each has a valid checksum."""
    chunks = array / "c"
    (chunks / first).rename(array / "first")
    (chunks / second).rename(chunks / first)
    (array / "first").rename(chunks / second)


def test_what_is_intact_is_verified(run_folder, model_folder, token_folder, capsys):
    code, out, _ = run(capsys, "info", run_folder, "--verify")
    assert code == 0
    lines = out.splitlines()
    assert [line.split(", ")[0] for line in lines] == [f"step {i}: verified" for i in (1, 2, 3)]
    n_bytes = 4 * (3 * CONFIG.model.n_params) + 4  # AdamW has two moments and a counter of steps
    assert abs(int(lines[0].split(", ")[1].split()[0].replace(",", "")) - n_bytes) < 100
    for folder in (model_folder, token_folder):
        code, out, _ = run(capsys, "info", folder, "--verify")
        assert (code, out.split(", ")[0]) == (0, f"{folder}: verified")


@pytest.mark.parametrize("seed", range(5))
def test_a_flipped_bit_in_an_array_is_reported(
    seed, run_folder, model_folder, token_folder, tmp_path, capsys
):
    rng = random.Random(seed)
    folders = {
        run_folder: (run_folder / "checkpoints" / "2", "step 2"),
        (model := tmp_path / "model"): (model, str(model)),
        (tokens := tmp_path / "tokens"): (tokens, str(tokens)),
    }
    shutil.copytree(model_folder, model)
    shutil.copytree(token_folder, tokens)
    for folder, (where, name) in folders.items():
        chunks = sorted(p for p in where.rglob("*") if p.is_file() and "c" in p.parts)
        flip_bit(rng.choice(chunks), seed)
        code, out, err = run(capsys, "info", folder, "--verify")
        assert code == 1
        assert [line for line in out.splitlines() if f"{name}: damaged (DATA_LOSS: " in line]
        assert ("step 1: verified" in out) == (folder == run_folder)
        assert "Traceback" not in err


def test_exchanged_chunks_are_reported(run_folder, model_folder, token_folder, tmp_path, capsys):
    model = shutil.copytree(model_folder, tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "SHARD_TOKENS", 1024)
        patch.setattr(shard_writer, "CHUNK_TOKENS", 256)
        tokens, sources = tmp_path / "tokens", [str(token_folder.parent / "*.txt")]
        tokenizer = token_folder / "tokenizer.model"
        tokenize_corpus(sources, tokens, tokenizer=tokenizer, progress=False)
    for folder, array, chunks in (
        (run_folder, "checkpoints/2/model/layers.w1", ("0/0/0", "1/0/0")),
        (model, "weights/model/layers.w1", ("0/0/0", "1/0/0")),
        (tokens, "train/tokens", ("0", "1")),
    ):
        exchange_chunks(folder / array, *chunks)
        code, out, _ = run(capsys, "info", folder, "--verify")
        assert code == 1
        name = array.removeprefix("checkpoints/2/")
        assert f": damaged ({name} is not the array that was written)" in out
        assert ("step 1: verified" in out) == (folder == run_folder)


def test_a_model_with_exchanged_chunks_is_not_converted(model_folder, tmp_path, capsys):
    model = shutil.copytree(model_folder, tmp_path / "model")
    exchange_chunks(model / "weights/model/layers.w1", "0/0/0", "1/0/0")
    code, _, err = run(capsys, "convert", model, tmp_path / "hf", "--to", "hf")
    assert code == 2
    assert "layers.w1 is damaged or cut short (it is not the array that was written)" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_missing_chunk_is_reported(run_folder, capsys):
    min((run_folder / "checkpoints/3/model/norm/c").rglob("*")).unlink()
    code, out, _ = run(capsys, "info", run_folder, "--verify")
    assert code == 1
    assert "step 2: verified" in out
    assert "step 3: damaged (NOT_FOUND: " in out


def test_damaged_and_incomplete_checkpoints_are_named_without_verify(run_folder, capsys):
    flip_bit(run_folder / "checkpoints/2/manifest.json")
    (run_folder / "checkpoints/3/manifest.json").unlink()
    code, out, _ = run(capsys, "info", run_folder)
    assert code == 0
    assert "progress    1 of 10 steps saved (not finished: train resumes it)" in out
    assert "checkpoints 1\n" in out
    assert "damaged     2 (the checksum of manifest.json differs; not used)" in out
    assert "incomplete  3 (not used)" in out
    code, out, _ = run(capsys, "info", run_folder, "--verify")
    assert code == 1
    assert "step 2: damaged (the checksum of manifest.json differs)" in out
    assert "step 3: incomplete (not used)" in out


def test_a_folder_that_is_none_of_them_is_refused(tmp_path, capsys):
    code, _, err = run(capsys, "info", tmp_path / "none", "--verify")
    assert (code, "there is no folder" in err) == (2, True)
    code, _, err = run(capsys, "info", tmp_path, "--verify")
    assert (code, "neither a run folder nor a model folder" in err) == (2, True)


def test_verifying_uses_no_device(model_folder):
    environment = os.environ | {"JAX_PLATFORMS": "none"}  # JAX can't start
    command = [sys.executable, "-m", "llama_jax", "info", str(model_folder), "--verify"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{model_folder}: verified, ")
