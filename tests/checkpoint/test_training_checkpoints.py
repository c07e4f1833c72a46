import dataclasses
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import mesh_of, tiny_config, tiny_model
from processes import Group

from llama_jax.checkpoint import array_files, tree
from llama_jax.checkpoint.folders import committed_steps
from llama_jax.checkpoint.model_folders import load_model, save_model
from llama_jax.checkpoint.training_checkpoints import Progress, TrainingCheckpoints
from llama_jax.config.run import CheckpointConfig
from llama_jax.errors import Fault, InputError
from llama_jax.inference.load import load
from llama_jax.runtime.folder_lock import FolderLock
from llama_jax.training.step import init_state

# Two hosts, each with half of the devices, load a model and save it twice.
SAVES_TWICE = """
import sys
import jax
from llama_jax.parallel import mesh
from llama_jax.runtime import hosts
from llama_jax.checkpoint.model_folders import load_model, save_model
from llama_jax.config.mesh import MeshConfig

folder, target, _, coordinator, _, processes, _, process = sys.argv[1:]
with hosts.join(coordinator, int(processes), int(process)):
    with jax.set_mesh(mesh.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        config, model = load_model(folder)
        assert not model.tok_embeddings[...].is_fully_addressable
        save_model(target, config, model, None)
        print("saved", flush=True)
        hosts.check_equal_on_hosts({})  # both have printed: the next error ends both
        save_model(target, config, model, None)
"""

CONFIG = tiny_config()
KEY = jax.random.key(0)


def equal(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


@pytest.fixture(scope="module")
def state():
    with jax.set_mesh(mesh_of((2, 2, 2))):
        return init_state(CONFIG, KEY)


@pytest.fixture(scope="module")
def seven_saves(state, tmp_path_factory):
    """Checkpoints of steps 1 to 7, of which the last 2 and every 3rd remain."""
    folder = tmp_path_factory.mktemp("saves") / "c"
    with jax.set_mesh(mesh_of((2, 2, 2))):
        checkpoints = TrainingCheckpoints(folder, CheckpointConfig(keep=2, keep_every=3))
        for step in range(1, 8):
            checkpoints.save(Progress(step, ["a", "b"]), *state)
        checkpoints.close()
    return folder


@pytest.fixture
def saved(seven_saves, tmp_path):
    """A copy of these checkpoints."""
    return shutil.copytree(seven_saves, tmp_path / "c")


@pytest.fixture(scope="module")
def model_folder(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    with jax.set_mesh(mesh_of((2, 2, 2))):
        save_model(folder, CONFIG.model, state[0], None)
    return folder


def test_a_killed_thread_that_saves_is_a_fault_before_the_next_step(state, tmp_path, monkeypatch):
    def kill(*_):
        raise SystemExit  # which ends a thread without a word

    with jax.set_mesh(mesh_of((2, 2, 2))):
        checkpoints = TrainingCheckpoints(tmp_path, CheckpointConfig())
        checkpoints.save(Progress(1, ["a"]), *state)
        checkpoints.wait()
        monkeypatch.setattr(array_files, "write_shards", kill)
        checkpoints.save(Progress(2, ["a"]), *state)
        checkpoints._saving[1]._thread.join()
    killed = r"the thread that writes it was killed \(SystemExit\)"
    with pytest.raises(
        Fault, match=rf"can't save step 2 in .* \({killed}\): the checkpoints of steps 1 are unch"
    ):
        checkpoints.check()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_the_newest_and_every_kth_checkpoint_remain(saved, tmp_path):
    (saved / "8" / "model").mkdir(parents=True)  # as a killed process leaves it
    (tmp_path / "checkpoints").symlink_to(saved)
    assert committed_steps(saved) == ([3, 6, 7], [8])
    assert TrainingCheckpoints(saved).steps == [3, 6, 7]


def test_an_incomplete_checkpoint_is_replaced_when_its_step_is_saved_again(saved, state):
    for step in ("8", "9"):  # as killed processes leave them
        (saved / step / "model").mkdir(parents=True)
        (saved / step / "model" / "old").touch()
    with jax.set_mesh(mesh_of((2, 2, 2))):
        checkpoints = TrainingCheckpoints(saved, CheckpointConfig(keep=9))
        checkpoints.save(Progress(8, ["a", "b"]), *state)
        checkpoints.close()
        assert committed_steps(saved) == ([3, 6, 7, 8], [])
        assert not (saved / "8" / "model" / "old").exists()
        abstract = tree.eval_shape_on_mesh(partial(init_state, CONFIG), KEY)
        _, *restored = TrainingCheckpoints(saved).restore(8, *abstract)
    assert equal(state, tuple(restored))


def test_a_run_that_lost_its_folder_changes_no_checkpoint(saved, state):
    def files():
        return {path: path.stat().st_mtime_ns for path in saved.rglob("*")}

    class Lost(FolderLock):
        def check(self):
            raise Fault("another run has taken over")

    (saved / "8").mkdir()
    (saved / "8" / "manifest.json").touch()
    before = files()
    with jax.set_mesh(mesh_of((2, 2, 2))):
        older = TrainingCheckpoints(saved, CheckpointConfig(), Lost(saved, ""))
        older.steps.remove(8)  # the newer run has saved it since this one started
        with pytest.raises(Fault, match="another run has taken over"):
            older.save(Progress(8, ["a", "b"]), *state)
        older.close()
    assert files() == before


def test_checkpoints_of_version_0_1_are_not_taken_for_incomplete_ones(tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "commit_success.txt").write_text("Checkpoint commit was successful")
    with pytest.raises(InputError, match=r"were written by llama_jax 0.1: finish the run"):
        TrainingCheckpoints(tmp_path, CheckpointConfig())


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4), (1, 1, 1)])
def test_a_checkpoint_restores_on_any_mesh_bit_for_bit(saved, state, shape):
    with jax.set_mesh(mesh_of(shape)):
        abstract = tree.eval_shape_on_mesh(partial(init_state, CONFIG), KEY)
        progress, *restored = TrainingCheckpoints(saved).restore(7, *abstract)
    assert progress == Progress(7, ["a", "b"])
    assert equal(state, tuple(restored))
    for leaf, wanted in zip(*map(jax.tree.leaves, (restored, abstract)), strict=True):
        assert leaf.sharding == wanted.sharding
        assert leaf.committed
    assert jax.tree.structure(tuple(restored)) == jax.tree.structure(state)


def test_arrays_on_disk_have_the_names_of_the_weights(state):
    names = tree.tree_to_dict(state[0])
    assert set(names) == {"tok_embeddings", "layers", "norm", "output"}
    assert set(names["layers"]) == {
        "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3",
    }  # fmt: skip


def test_a_model_folder_loads_the_weights_that_were_saved(model_folder, state):
    with jax.set_mesh(mesh_of((1, 2, 4))):
        config, model = load_model(model_folder)
    assert config == CONFIG.model
    assert equal(model, state[0])
    assert not list(model_folder.parent.glob(".*"))


def test_weights_are_cast_to_the_requested_type(model_folder):
    half = dataclasses.replace(CONFIG.model, param_dtype="bfloat16")
    with jax.set_mesh(mesh_of((1, 1, 1))):
        _, model = load_model(model_folder, half)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {"bfloat16"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"dim": 64},
            r"model.\S+ is \(.*32.*\) in the checkpoint, but \(.*64.*\) in the configuration",
        ),
        ({"n_layers": 3}, r"model.layers\S+ is \(2, .*\) in the checkpoint, but \(3, .*\) in the"),
        (
            {"tied_head": True},
            r"model.output is \(.*\) in the checkpoint, but absent in the configuration",
        ),
    ],
)
def test_a_model_of_another_shape_is_refused(model_folder, changes, sentence):
    with jax.set_mesh(mesh_of((1, 1, 1))), pytest.raises(InputError, match=sentence):
        load_model(model_folder, tiny_model(**changes))


def test_folders_without_a_model_are_refused(model_folder, tmp_path):
    with pytest.raises(InputError, match="neither a run folder nor a model folder"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load_model(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    with pytest.raises(InputError, match=r"config.json is not the configuration of a llama_jax"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="already exists"):
        save_model(model_folder, CONFIG.model, None, None)
    for path in ("hdfs://b/m", "gs:/b/m", Path("gs://b/m")):  # Path removes a slash
        with pytest.raises(InputError, match=r"are not supported|names no bucket"):
            load_model(path)
        with pytest.raises(InputError, match=r"are not supported|names no bucket"):
            save_model(path, CONFIG.model, None, None)


def test_an_unstacked_model_is_saved_with_stacked_layers(state, model_folder, tmp_path):
    with jax.set_mesh(mesh_of((1, 1, 1))):
        config, unstacked = load(model_folder)
        save_model(tmp_path / "again", config, unstacked, None)
        assert equal(load_model(tmp_path / "again", config)[1], state[0])


@pytest.mark.slow
def test_several_hosts_save_one_model(model_folder, state, tmp_path):
    target = tmp_path / "target"
    group = Group(tmp_path / "output", 2, model_folder, target, program=("-c", SAVES_TWICE))
    assert group.wait() == [2, 2], group.outputs("err")
    # Gloo writes to standard output as well.
    assert ["saved" in output for output in group.outputs("out")] == [True, True]
    for output in group.outputs("err"):
        assert f"{target} already exists" in output.splitlines()[-1]
    assert {p.name for p in tmp_path.iterdir()} == {"output", "target"}
    with jax.set_mesh(mesh_of((1, 1, 1))):
        config, model = load_model(target)
    assert config == CONFIG.model
    assert equal(model, state[0])
