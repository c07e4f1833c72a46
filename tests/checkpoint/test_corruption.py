"""Every corruption of a stored file is detected by the code that reads the file."""

import random
import shutil
from functools import partial
from pathlib import Path

import jax
import pytest
from conftest import mesh_of, tiny_config

from llama_jax.checkpoint import tree
from llama_jax.checkpoint.model_folders import load_model
from llama_jax.checkpoint.training_checkpoints import Progress, TrainingCheckpoints
from llama_jax.config.run import CheckpointConfig, DataConfig
from llama_jax.data.shards import TokenStream
from llama_jax.data.windows import Windows
from llama_jax.errors import InputError
from llama_jax.runtime.damage import Damaged
from llama_jax.tokenizer.tokenizer import load_tokenizer
from llama_jax.training.step import init_state

CONFIG = tiny_config()
STEP = 7
# The kinds of files, as glob patterns. Each is corrupted in six ways.
KINDS = {
    "checkpoint": [
        "manifest.json", "_CHECKPOINT_METADATA", "*/_METADATA", "*/*/zarr.json", "*/*/c/**/*",
    ],
    "model": [
        "manifest.json", "config.json", "tokenizer.model", "weights/_CHECKPOINT_METADATA",
        "weights/*/_METADATA", "weights/*/*/zarr.json", "weights/*/*/c/**/*",
    ],
    "tokens": [
        "meta.json", "tokenizer.model", "*/tokens/zarr.json", "*/tokens/c/*", "*/starts/zarr.json",
        "*/starts/c/*",
    ],
}  # fmt: skip
WAYS = ("flip", "flip", "flip", "cut", "empty", "delete")
TABLE = [
    (folder, kind, way, seed)
    for folder, kinds in KINDS.items()
    for kind in kinds
    for seed, way in enumerate(WAYS)
]


def corrupt(path: Path, way: str, rng: random.Random) -> None:
    """Corrupts a file: flips one bit, cuts it short, empties it or deletes it."""
    data = bytearray(path.read_bytes())
    if way == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.unlink()
    if way != "delete":
        size = {"flip": len(data), "cut": rng.randrange(1, len(data)), "empty": 0}[way]
        path.write_bytes(data[:size])


@pytest.fixture(scope="module")
def abstract():
    with jax.set_mesh(mesh_of((1, 1, 1))):
        return tree.eval_shape_on_mesh(partial(init_state, CONFIG), jax.random.key(0))


@pytest.fixture(scope="module")
def originals(model_folder, token_folder, tmp_path_factory):
    """Each folder, in which nothing is damaged."""
    folder = tmp_path_factory.mktemp("run")
    with jax.set_mesh(mesh_of((1, 1, 1))):
        saved = TrainingCheckpoints(folder, CheckpointConfig())
        saved.save(Progress(STEP, ["a"]), *init_state(CONFIG, jax.random.key(0)))
        saved.close()
    return {"checkpoint": folder / str(STEP), "model": model_folder, "tokens": token_folder}


@pytest.fixture
def read(abstract):
    """Returns functions that read all of each kind of folder, as the program does."""

    def checkpoint(folder):
        with jax.set_mesh(mesh_of((1, 1, 1))):
            return TrainingCheckpoints(folder.parent).restore(STEP, *abstract)

    def model(folder):
        with jax.set_mesh(mesh_of((1, 1, 1))):
            return *load_model(folder), load_tokenizer(folder).n_vocab

    def tokens(folder):
        config = DataConfig(mixture={str(folder): 1.0}, batch_size=1, seq_len=16)
        windows = [Windows(TokenStream(folder, s), config) for s in ("train", "validation")]
        load_tokenizer(folder)
        return [source[i] for source in windows for i in range(len(source))]

    return {"checkpoint": checkpoint, "model": model, "tokens": tokens}


def test_what_is_not_corrupted_is_read(originals, read):
    for name, folder in originals.items():
        read[name](folder)


@pytest.mark.parametrize(("name", "kind", "way", "seed"), TABLE)
def test_a_corrupted_file_is_detected(name, kind, way, seed, originals, read, tmp_path):
    rng = random.Random(f"{name} {kind} {seed}")
    folder = shutil.copytree(originals[name], tmp_path / originals[name].name)
    path = rng.choice(sorted(p for p in folder.glob(kind) if p.is_file()))
    corrupt(path, way, rng)
    # The meaning of config.json is verified, not its bytes: users may edit it. A folder without
    # meta.json is no folder of token shards.
    other_message = kind == "config.json" or (kind, way) == ("meta.json", "delete")
    error = InputError if other_message else Damaged
    with pytest.raises(error) as caught:
        read[name](folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("checkpoint", "model", r"model\.layers\.wq is not the array that was saved"),
        ("model", "weights/model", "model/layers.wq is not the array that was written"),
    ],
)
def test_chunks_that_are_exchanged_are_detected(name, weights, message, originals, read, tmp_path):
    """Their checksums are right; the fingerprint or the content sum of the array is not."""
    folder = shutil.copytree(originals[name], tmp_path / originals[name].name)
    exchange(*(folder / weights / f"layers.wq/c/{layer}/0/0/0" for layer in (0, 1)))
    with pytest.raises(Damaged, match=message):
        read[name](folder)


def exchange(first, second):
    ours, theirs = first.read_bytes(), second.read_bytes()
    assert ours != theirs
    first.write_bytes(theirs)
    second.write_bytes(ours)
