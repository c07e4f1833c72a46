"""An unreadable checkpoint is reported as damaged only if its files certainly are."""

import errno
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import tensorstore as ts
from conftest import mesh_of, tiny_config

from llama_jax.checkpoint import arrays, tree
from llama_jax.checkpoint.model_folders import load_model
from llama_jax.checkpoint.single_weights import WeightsReader
from llama_jax.checkpoint.training_checkpoints import Progress, TrainingCheckpoints
from llama_jax.config.run import CheckpointConfig
from llama_jax.errors import Fault, InputError
from llama_jax.runtime import storage
from llama_jax.training.step import init_state

CONFIG = tiny_config()
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The checkpoints folder of a run, with the checkpoint of step 7."""
    folder = tmp_path_factory.mktemp("run") / "c"
    with jax.set_mesh(mesh_of((2, 2, 2))):
        saved = TrainingCheckpoints(folder, CheckpointConfig())
        saved.save(Progress(7, ["a"]), *init_state(CONFIG, KEY))
        saved.close()
    return folder


def restore(folder):
    with jax.set_mesh(mesh_of((1, 1, 1))):
        abstract = tree.eval_shape_on_mesh(partial(init_state, CONFIG), KEY)
        return TrainingCheckpoints(folder).restore(7, *abstract)


def system_error(number):
    return OSError(number, os.strerror(number))


def tensorstore_error(status):
    return ValueError(f'{status} [tensorstore_spec=\'{{"driver":"zarr3"}}\']')


# The exceptions of machine faults in Python, TensorStore (found by letting system calls fail) and
# JAX.
FAULTS = [
    MemoryError("Unable to allocate 3.00 GiB for an array"),
    system_error(errno.EIO),
    system_error(errno.EACCES),
    system_error(errno.EMFILE),
    system_error(errno.ETIMEDOUT),
    system_error(errno.ESTALE),
    tensorstore_error('UNKNOWN: Error opening "zarr3" driver: Failed to read: Input/output error'),
    tensorstore_error("PERMISSION_DENIED: Error reading: Failed to open: Permission denied"),
    tensorstore_error("RESOURCE_EXHAUSTED: Error reading: Failed to open: Too many open files"),
    tensorstore_error("RESOURCE_EXHAUSTED: Error reading: Cannot allocate memory"),
    tensorstore_error("DEADLINE_EXCEEDED: Error reading: Connection timed out"),
    tensorstore_error("ABORTED: Error reading: Stale file handle"),
    tensorstore_error("UNAVAILABLE: Error reading: Connection refused"),
    tensorstore_error(
        "FAILED_PRECONDITION: Error reading: Requested byte range [-20, ?) was ignored by server"
    ),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes."),
]


@pytest.mark.parametrize("error", FAULTS, ids=str)
@pytest.mark.parametrize("stage", ["metadata", "open", "read"])
def test_a_machine_fault_is_not_reported_as_damage(
    checkpoints, model_folder, monkeypatch, stage, error
):
    def fail(*_, **__):
        raise error

    real = ts.open

    class Store:
        def __init__(self, store):
            self.shape = store.shape

        def __getitem__(self, _):
            return self

        def read(self):
            return SimpleNamespace(result=fail)

    def opened(*args, **options):
        store = Store(real(*args, **options).result())
        return SimpleNamespace(result=lambda: store)

    if stage == "metadata":
        if not isinstance(error, OSError | MemoryError):
            return  # TensorStore and JAX read no metadata
        read_regular = storage.read_regular

        def read(path):
            return fail() if path.name == "_METADATA" else read_regular(path)

        monkeypatch.setattr(storage, "read_regular", read)
    else:
        monkeypatch.setattr(ts, "open", opened if stage == "read" else fail)

    def load():
        with jax.set_mesh(mesh_of((1, 1, 1))):
            load_model(model_folder)

    def read_one():
        WeightsReader(model_folder).read("norm", None)

    for reads in (lambda: restore(checkpoints), load, read_one):
        with pytest.raises(Fault) as raised:
            reads()
        message = str(raised.value)
        assert "could not be read (" in message
        assert str(error).split(" [tensor")[0] in message
        assert "tensorstore_spec" not in message
        assert "damaged" not in message
        assert "remove" not in message
        assert raised.value.__cause__ is error


def test_a_bug_is_not_reported_as_a_damaged_checkpoint_or_a_fault(checkpoints, monkeypatch):
    def wrong(*_):
        raise TypeError("a bug")

    monkeypatch.setattr(arrays, "_make_array", wrong)
    with pytest.raises(TypeError, match="a bug"):
        restore(checkpoints)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model/norm/c/*", truncate),
        ("model/layers.wq/c/1/0/0/0", zero),
        ("model/tok_embeddings/c/*/*", Path.unlink),
        ("optimizer/*layers.wq/zarr.json", zero),
        ("manifest.json", zero),
        ("manifest.json", Path.unlink),
        ("model/_METADATA", zero),
        ("model/_METADATA", Path.unlink),
        ("model/_METADATA", lambda path: path.write_text("[]")),
        ("model/_METADATA", lambda path: path.write_bytes(b'{"\xff": 1}')),
        ("model/_METADATA", lambda path: path.write_text('{"tree_metadata": {"a": {}}}')),
        ("_CHECKPOINT_METADATA", zero),
        ("_CHECKPOINT_METADATA", Path.unlink),
        ("_CHECKPOINT_METADATA", lambda path: path.write_text('{"custom_metadata": {}}')),
        ("model", lambda path: path.rename(path.with_name("elsewhere"))),
    ],
)
def test_damage_is_reported_with_its_file_and_no_advice_to_delete_anything(
    checkpoints, tmp_path, capfd, file, damage
):
    copy = tmp_path / "c"
    shutil.copytree(checkpoints, copy)
    damage(next((copy / "7").glob(file)))
    with pytest.raises(InputError) as raised:
        restore(copy)
    message = str(raised.value)
    assert message.startswith(f"{copy / '7'} is damaged or cut short (")
    assert message.endswith("put a copy in its place, or create it again")
    assert "remove" not in message
    assert capfd.readouterr().err == ""
