import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jax.experimental.compilation_cache import compilation_cache
from program_folder import program_folder

from llama_jax.runtime import program_files
from llama_jax.runtime.private_folder import open_private_folder, read_private
from llama_jax.runtime.program_store import stored_jit, stored_number, stored_programs


@pytest.fixture
def folder(tmp_path):
    with jax.set_mesh(mesh_of((1, 1, 1))), program_folder(tmp_path) as folder:
        yield folder


class Traced:
    """A stored program that counts its traces: a program that is read has none."""

    def __init__(self):
        self.count = 0

        def scale_add(factor: int, x: dict[str, jax.Array], y: int) -> jax.Array:
            self.count += 1
            return factor * x["a"] + y

        self.program = stored_jit(static_argnums=0)(scale_add)

    def start(self, factor: int = 3, size: int = 4, dtype: str = "float32") -> int:
        """Runs the program in a new block, checks its result; returns the number of traces."""
        before, x = self.count, jnp.arange(size, dtype=dtype)
        jax.clear_caches()
        with stored_programs("test", size):
            for y in (1, 5):
                found = self.program(factor, {"a": x}, y)
                np.testing.assert_array_equal(found, factor * np.arange(size) + y)
        return self.count - before


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith("scale_add-")]


def test_a_program_is_traced_at_the_first_start_only(folder):
    traced = Traced()
    assert [traced.start() for _ in range(3)] == [1, 0, 0]
    (entry,) = entries(folder)
    assert [path.stat().st_mode & 0o777 for path in (entry, folder)] == [0o600, 0o700]


@pytest.mark.parametrize("other", [{"factor": 2}, {"size": 5}, {"dtype": "int32"}])
def test_another_argument_needs_another_program(folder, other):
    traced = Traced()
    assert [traced.start(), traced.start(**other), traced.start(), traced.start(**other)] == [
        1, 1, 0, 0,
    ]  # fmt: skip


def test_other_sources_versions_or_settings_need_other_programs(folder, monkeypatch):
    traced = Traced()
    assert traced.start() == 1
    monkeypatch.setattr(program_files, "_environment", lambda: "another version")
    assert traced.start() == 1
    assert len(entries(folder)) == 2


def test_a_number_is_measured_at_the_first_start_only(folder):
    measured = iter(range(1, 9))

    def start(cores: int) -> float:
        with stored_programs("test"):
            return stored_number("speed", cores, lambda: next(measured) / 3)

    assert [start(2), start(2), start(4), start(2)] == [1 / 3, 1 / 3, 2 / 3, 1 / 3]
    for path in folder.glob("speed-*"):
        path.write_text("fast")
    assert start(2) == 1
    assert stored_number("speed", 2, lambda: 9) == 9  # without a block


@pytest.mark.parametrize("n_kept", [0, 10, 500, -1])
def test_a_damaged_entry_is_replaced(folder, n_kept):
    traced = Traced()
    traced.start()
    (entry,) = entries(folder)
    data = entry.read_bytes()
    entry.write_bytes(data[:n_kept])
    assert [traced.start(), traced.start()] == [1, 0]
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 1
    entry.write_bytes(damaged)
    assert [traced.start(), traced.start()] == [1, 0]


def test_an_entry_that_others_could_have_written_is_not_read(folder, capsys):
    traced = Traced()
    traced.start()
    (entry,) = entries(folder)
    entry.chmod(0o666)
    assert [traced.start(), traced.start()] == [1, 0]  # replaced
    folder.chmod(0o777)
    assert [traced.start(), traced.start()] == [1, 1]  # without the folder
    assert f"others can change {folder}: let only its owner write to it" in capsys.readouterr().err
    folder.chmod(0o700)
    folder.parent.chmod(0o777)
    assert traced.start() == 1
    folder.parent.chmod(0o1777)  # others can't rename what is in it
    assert traced.start() == 0


def test_a_private_folder_belongs_to_this_user(tmp_path, monkeypatch):
    folder = open_private_folder(tmp_path / "cache" / "programs")
    (folder / "file").write_bytes(b"content")
    (folder / "link").symlink_to(folder / "file")
    os.mkfifo(folder / "pipe")
    names = ("file", "link", "pipe", "missing")
    assert [read_private(folder / name) for name in names] == [b"content", None, None, None]
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        open_private_folder(folder)
    assert read_private(folder / "file") is None


def test_a_program_from_the_compilation_cache_is_not_stored(tmp_path):
    traced = Traced()
    before = os.environ["JAX_COMPILATION_CACHE_DIR"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    try:
        with jax.set_mesh(mesh_of((1, 1, 1))):
            jnp.zeros(3).block_until_ready()  # JAX decides here, once, that it uses its cache
            assert traced.start() == 1
            (entry,) = entries(tmp_path / "programs")
            entry.unlink()
            assert [traced.start(), traced.start()] == [1, 1]
            assert entries(tmp_path / "programs") == []
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def test_the_programs_that_were_not_used_for_longest_are_removed(folder, monkeypatch):
    traced = Traced()
    for size in (2, 3, 4):
        traced.start(size=size)
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert traced.start(size=3) == 0  # which is a use
    used = {path for path in entries(folder) if path.stat().st_mtime > 1}
    monkeypatch.setattr(program_files, "_MAX_BYTES", 2 * len(next(iter(used)).read_bytes()))
    traced.start(size=5)
    assert used < set(entries(folder))
    assert len(entries(folder)) < 4


def test_a_program_inside_another_and_one_without_a_store_are_jitted(folder):
    traced = Traced()
    x = jnp.ones(3)
    assert traced.program(2, {"a": x}, 1).tolist() == [3, 3, 3]
    with stored_programs("test"):
        outer = jax.jit(lambda x: traced.program(2, {"a": x}, 1))
        assert outer(x).tolist() == [3, 3, 3]
    assert entries(folder) == []
