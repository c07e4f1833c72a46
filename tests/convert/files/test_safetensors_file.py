"""Safetensors files: read and written like the safetensors library, refused if damaged."""

import json

import numpy as np
import pytest
from conftest import peer
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tensor_files import read_error, sample_arrays, write_tensors

from llama_jax.convert.files.safetensors import read_safetensors
from llama_jax.errors import InputError


def is_same(stored, array):
    """Whether a tensor in a file has the shape, type and bits of `array`."""
    ours = stored.read()
    assert (stored.shape, stored.dtype, stored.nbytes) == (array.shape, array.dtype, array.nbytes)
    assert (ours.shape, ours.dtype, ours.flags.writeable) == (array.shape, array.dtype, False)
    return ours.tobytes() == array.tobytes()


def test_reads_a_file_of_the_library(tmp_path):
    theirs = sample_arrays()
    save_file(theirs, tmp_path / "w.safetensors", metadata={"format": "pt", "note": "é"})
    ours = read_safetensors(tmp_path / "w.safetensors")
    assert set(ours) == set(theirs)
    assert all(is_same(ours[name], theirs[name]) for name in theirs)


def test_the_library_reads_our_file(tmp_path):
    tensors = sample_arrays()
    path = write_tensors(tmp_path / "w.safetensors", tensors)
    ours, theirs = read_safetensors(path), load_file(path)
    assert list(ours) == list(tensors)
    assert set(theirs) == set(tensors)
    for name, array in tensors.items():
        assert is_same(ours[name], array)
        assert is_same(ours[name], theirs[name])
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_torch_reads_our_file(tmp_path):
    torch, tensors = peer("torch"), sample_arrays()
    path = write_tensors(tmp_path / "w.safetensors", tensors)
    with safe_open(path, "pt") as file:
        for name, array in tensors.items():
            theirs = file.get_tensor(name)
            assert tuple(theirs.shape) == array.shape
            assert theirs.reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()


def test_reads_real_checkpoints_as_the_library_does(shared_data):
    paths = sorted(shared_data.rglob("*.safetensors"))
    assert len(paths) == 3
    for path in paths:
        ours, theirs = read_safetensors(path), load_file(path)
        assert set(ours) == set(theirs)
        assert all(is_same(ours[name], theirs[name]) for name in theirs)


def raw_file(path, header, data=bytes(24)):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(begin=0, end=24, shape=(2, 3), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


GOOD = json.dumps(entry())


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"w": entry(shape=(2, 4))}, "'w' has 24 bytes, not 32"),
        ({"w": entry(dtype="F16")}, "'w' has 24 bytes, not 12"),
        ({"w": entry(dtype="F8_E4M3", shape=(24,))}, "has the dtype 'F8_E4M3'"),
        ({"w": entry(24, 0)}, "'w' has -24 bytes, not 24"),
        ({"w": entry(4, 28)}, "leaves a gap or overlaps"),
        ({"v": entry(0, 8, (2,)), "w": entry(0, 24)}, "leaves a gap or overlaps"),
        ({"v": entry(0, 8, (2,)), "w": entry(12, 24, (3,))}, "leaves a gap or overlaps"),
        ({"w": entry(0, 20, (5,))}, "is damaged: it has"),
        ({"w": entry(0, 28, (7,))}, "is cut short: it has"),
        ({}, "is damaged: it has"),
        ({"w": entry(-24, 0)}, "its entry for 'w'"),
        ({"w": entry(0, 24.0)}, "its entry for 'w'"),
        ({"w": entry(False, 24)}, "its entry for 'w'"),
        ({"w": entry(shape=(-2, -3))}, "its entry for 'w'"),
        ({"w": entry(shape=(2**70, 0), end=0)}, "a shape beyond NumPy's limits"),
        ({"w": entry(shape=(2**32, 2**32))}, "a shape beyond NumPy's limits"),
        ({"w": entry(shape=(1,) * 40)}, "a shape beyond NumPy's limits"),
        ({"w": entry() | {"dtype": 3}}, "its entry for 'w'"),
        ({"w": entry() | {"shape": "23"}}, "its entry for 'w'"),
        ({"w": entry() | {"data_offsets": [0, 12, 24]}}, "its entry for 'w'"),
        ({"w": {"dtype": "F32"}}, "its entry for 'w'"),
        ({"w": [1, 2]}, "its entry for 'w'"),
        ({"\ud800": entry()}, "damaged header"),
        ([entry()], "not a table of tensors"),
        (b"", "damaged header"),
        (b"{", "damaged header"),
        (b"\xff\xfe{}", "damaged header"),
        (b"[" * 100_000, "damaged header"),
        (b'{"w": ' * 100_000, "damaged header"),
        (b'{"w": ' + b"9" * 5000 + b"}", "damaged header"),
        (f'{{"w": {GOOD}, "w": {GOOD}}}'.encode(), "a key occurs twice"),
        (f'{{"w": {GOOD[:-1]}, "dtype": "F32"}}}}'.encode(), "a key occurs twice"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header, why):
    assert why in read_error(raw_file(tmp_path / "w.safetensors", header))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    assert "there is no" in read_error(path)
    path.mkdir()
    assert "is a directory, not a regular file" in read_error(path)
    path.rmdir()
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert "not a safetensors file" in read_error(path)
    path.write_bytes((100_000_001).to_bytes(8, "little"))
    assert "not a safetensors file" in read_error(path)
    raw_file(path, {"w": entry()}, bytes(25))
    assert "damaged" in read_error(path)


def test_a_file_cut_short_is_refused(tmp_path):
    path = raw_file(tmp_path / "w.safetensors", {"w": entry()})
    raw = path.read_bytes()
    assert read_safetensors(path)["w"].nbytes == 24
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        assert "cut short" in read_error(path)


def test_flipped_bits_of_the_header_end_in_an_input_error_or_a_tensor(tmp_path):
    path = tmp_path / "w.safetensors"
    header = {"model.norm.weight": entry(0, 8, (2,)), "lm_head.weight": entry(8, 24, (2, 2))}
    raw = raw_file(path, header).read_bytes()
    assert len(read_safetensors(path)) == 2
    rng = np.random.default_rng(0)
    read = 0
    for _ in range(400):
        flipped = bytearray(raw)
        for position in rng.integers(0, len(raw) - 24, rng.integers(1, 4)):
            flipped[position] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            for stored in read_safetensors(path).values():
                assert stored.read().nbytes == stored.nbytes
            read += 1
        except InputError:
            pass
    assert 5 < read < 395
