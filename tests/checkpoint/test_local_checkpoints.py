from functools import partial

import jax
import numpy as np
import pytest
from conftest import mesh_of, tiny_config

from llama_jax.checkpoint import array_files, tree
from llama_jax.checkpoint.local_checkpoints import LocalCheckpoints
from llama_jax.checkpoint.training_checkpoints import Progress
from llama_jax.config.run import LocalCheckpointConfig
from llama_jax.training.step import init_state

KEY = jax.random.key(0)
LAST = 100


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(mesh_of((2, 2, 2))):
        yield


@pytest.fixture(scope="module")
def state():
    with jax.set_mesh(mesh_of((2, 2, 2))):
        return init_state(tiny_config(), KEY)


def open_checkpoints(tmp_path, newest_shared=0):
    (tmp_path / "run").mkdir(exist_ok=True)
    config = LocalCheckpointConfig(path=str(tmp_path / "disk"), every=1)
    return LocalCheckpoints(tmp_path / "run", config, newest_shared, LAST)


def save(tmp_path, state, steps):
    """Saves at each step; returns the folder of the last."""
    checkpoints = open_checkpoints(tmp_path)
    for step in steps:
        checkpoints.save(Progress(step, ["a"]), *state)
    checkpoints.close()
    return checkpoints.folder / str(steps[-1])


def restore(checkpoints):
    like = tree.eval_shape_on_mesh(partial(init_state, tiny_config()), KEY)
    return checkpoints.restore_newest(*like)


def equal(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) and x.sharding == y.sharding for x, y in leaves)


def saved_steps(checkpoints):
    return sorted(int(path.name) for path in checkpoints.folder.iterdir())


def test_the_newest_step_is_restored_bit_for_bit(tmp_path, state, capfd):
    save(tmp_path, state, [1, 2, 3, 4])
    checkpoints = open_checkpoints(tmp_path, newest_shared=2)
    assert checkpoints.steps == [3, 4]
    assert saved_steps(checkpoints) == [2, 3, 4]  # two, and the last one
    progress, *restored = restore(checkpoints)
    assert progress == Progress(4, ["a"])
    assert equal(state, tuple(restored))
    assert "restored the local checkpoints of step 4 in " in capfd.readouterr().err


def test_steps_that_the_shared_checkpoint_has_are_not_restored(tmp_path, state):
    save(tmp_path, state, [1, 2])
    checkpoints = open_checkpoints(tmp_path, newest_shared=2)
    assert checkpoints.steps == []
    assert restore(checkpoints) is None


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_restored(tmp_path, state, capfd):
    folder = save(tmp_path, state, [1, 2])
    chunk = next(p for p in (folder / "model").rglob("c/**/*") if p.is_file())
    data = bytearray(chunk.read_bytes())
    data[7] ^= 1
    chunk.write_bytes(data)
    progress, *restored = restore(open_checkpoints(tmp_path))
    assert progress.step == 1
    assert equal(state, tuple(restored))
    err = capfd.readouterr().err
    assert "the local checkpoint of step 2 on host 0: " in err
    assert "restored the local checkpoints of step 1 in " in err


@pytest.mark.parametrize("name", ["manifest.json", "model/norm/zarr.json"])
def test_a_changed_small_file_is_damage(tmp_path, state, capfd, name):
    path = save(tmp_path, state, [1, 2]) / name
    path.write_bytes(path.read_bytes().replace(b"2", b"3"))
    assert restore(open_checkpoints(tmp_path))[0].step == 1
    assert f"the checksum of {name} differs" in capfd.readouterr().err


def test_without_a_manifest_a_folder_is_removed_at_the_next_start(tmp_path, state):
    folder = save(tmp_path, state, [1, 2])
    (folder / "manifest.json").unlink()
    assert open_checkpoints(tmp_path).steps == [1]
    assert not folder.exists()


def test_checkpoints_of_another_mesh_are_ignored_and_replaced(tmp_path, state):
    save(tmp_path, state, [1, 2])
    with jax.set_mesh(mesh_of((1, 4, 2))):
        checkpoints = open_checkpoints(tmp_path)
        assert checkpoints.steps == []
        assert saved_steps(checkpoints) == [1, 2]
        state = init_state(tiny_config(), KEY)
        checkpoints.save(Progress(1, ["a"]), *state)
        checkpoints.close()
        assert saved_steps(checkpoints) == [1]
        assert open_checkpoints(tmp_path).steps == [1]


def test_a_new_run_of_the_same_path_has_no_local_checkpoints(tmp_path, state):
    save(tmp_path, state, [1])
    (tmp_path / "run" / "run_id").unlink()
    assert open_checkpoints(tmp_path).steps == []


def test_a_finished_run_removes_its_local_checkpoints(tmp_path, state):
    save(tmp_path, state, [1])
    open_checkpoints(tmp_path).remove()
    assert not list((tmp_path / "disk").iterdir())


def test_after_a_failed_save_the_run_continues_without_local_checkpoints(
    tmp_path, state, monkeypatch, capfd
):
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(Progress(1, ["a"]), *state)
    checkpoints.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(array_files, "write_shards", full)
    for step in (2, 3):
        checkpoints.save(Progress(step, ["a"]), *state)
    checkpoints.close()
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "host 0: can't save step 2 in " in err
    assert "No space left on device): the run continues without local checkpoints of this" in err
    assert saved_steps(checkpoints) == [1]
