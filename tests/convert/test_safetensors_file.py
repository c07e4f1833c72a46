import json
import math

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from llama_jax.convert.safetensors_file import SafetensorsWriter, read_safetensors
from llama_jax.errors import InputError

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
SHAPES = [(), (0,), (3, 0, 2), (1,), (5,), (7, 3), (2, 1, 3, 2)]


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch")


def arrays():
    """Tensors of every dtype and of many shapes, of random bits, the widest first."""
    rng = np.random.default_rng(0)
    found = {}
    for kind in sorted(DTYPES, key=lambda kind: -np.dtype(DTYPES[kind]).itemsize):
        for shape in SHAPES:
            size = math.prod(shape) * np.dtype(DTYPES[kind]).itemsize
            raw = rng.integers(0, 2 if kind == "BOOL" else 256, size, np.uint8)
            found[f"{kind}.{shape}"] = raw.view(DTYPES[kind]).reshape(shape)
    return found


def write(path, tensors):
    header = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    with SafetensorsWriter(path, header) as file:
        for name, array in tensors.items():
            file.write(name, array)
    return path


def same(stored, array):
    ours = stored.read()
    assert (stored.shape, stored.dtype, stored.nbytes) == (array.shape, array.dtype, array.nbytes)
    assert (ours.shape, ours.dtype, ours.flags.writeable) == (array.shape, array.dtype, False)
    return ours.tobytes() == array.tobytes()


def test_reads_what_the_library_writes(tmp_path):
    theirs = arrays()
    save_file(theirs, tmp_path / "w.safetensors", metadata={"format": "pt", "note": "é"})
    ours = read_safetensors(tmp_path / "w.safetensors")
    assert set(ours) == set(theirs)
    assert all(same(ours[name], theirs[name]) for name in theirs)


def test_the_library_reads_what_is_written(tmp_path):
    tensors = arrays()
    path = write(tmp_path / "w.safetensors", tensors)
    ours, theirs = read_safetensors(path), load_file(path)
    assert list(ours) == list(tensors)
    assert set(theirs) == set(tensors)
    for name, array in tensors.items():
        assert same(ours[name], array)
        assert same(ours[name], theirs[name])
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_torch_reads_what_is_written(torch, tmp_path):
    tensors = arrays()
    path = write(tmp_path / "w.safetensors", tensors)
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
        assert all(same(ours[name], theirs[name]) for name in theirs)


def test_elements_in_any_order_are_written_in_row_major(tmp_path):
    weight = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    views = {"t": weight.T, "s": weight[:, ::2], "e": np.broadcast_to(weight[0, 0, 1], (3, 2))}
    ours = read_safetensors(write(tmp_path / "w.safetensors", views))
    for name, array in views.items():
        np.testing.assert_array_equal(ours[name].read(), array)


def test_the_writer_refuses_what_its_header_does_not_say(tmp_path):
    path, one = tmp_path / "w.safetensors", np.ones(2, np.float32)
    header = {"a": ((2,), np.float32), "b": ((2,), np.float32)}
    wrong = [
        ("b", one, "b was written where a was due"),
        ("a", one[:1], r"a is float32\(1,\), not float32\(2,\)"),
        ("a", one.astype(np.float16), r"a is float16\(2,\), not float32\(2,\)"),
    ]
    for name, array, message in wrong:
        with pytest.raises(ValueError, match=message), SafetensorsWriter(path, header) as file:
            file.write(name, array)
    with pytest.raises(ValueError, match="lacks b"), SafetensorsWriter(path, header) as file:
        file.write("a", one)
    with pytest.raises(ValueError, match="no complex64 tensor c"):
        SafetensorsWriter(path, {"c": ((2,), np.complex64)})
    assert list(tmp_path.iterdir()) == []


def test_a_closed_writer_can_be_closed_again(tmp_path):
    path = tmp_path / "w.safetensors"
    with SafetensorsWriter(path, {"a": ((2,), np.float32)}) as file:
        file.write("a", np.ones(2, np.float32))
        assert not path.exists()
        file.close()
        assert path.exists()
        file.close()
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def refused(path):
    """The message with which a file is refused."""
    with pytest.raises(InputError) as caught:
        read_safetensors(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))
    return message


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
        ({"w": entry(shape=(2**70, 0), end=0)}, "a shape beyond all bounds"),
        ({"w": entry(shape=(2**32, 2**32))}, "a shape beyond all bounds"),
        ({"w": entry(shape=(1,) * 40)}, "a shape beyond all bounds"),
        ({"w": entry() | {"dtype": 3}}, "its entry for 'w'"),
        ({"w": entry() | {"shape": "23"}}, "its entry for 'w'"),
        ({"w": entry() | {"data_offsets": [0, 12, 24]}}, "its entry for 'w'"),
        ({"w": {"dtype": "F32"}}, "its entry for 'w'"),
        ({"w": [1, 2]}, "its entry for 'w'"),
        ({"\ud800": entry()}, "damaged header"),
        ([entry()], "no table of tensors"),
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
    assert why in refused(raw_file(tmp_path / "w.safetensors", header))


def test_files_that_are_none_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    assert "there is no" in refused(path)
    assert "can't be read" in refused(tmp_path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert "no safetensors file" in refused(path)
    path.write_bytes((100_000_001).to_bytes(8, "little"))
    assert "no safetensors file" in refused(path)
    raw_file(path, {"w": entry()}, bytes(25))
    assert "damaged" in refused(path)


def test_a_file_cut_short_is_refused(tmp_path):
    path = raw_file(tmp_path / "w.safetensors", {"w": entry()})
    raw = path.read_bytes()
    assert read_safetensors(path)["w"].nbytes == 24
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        assert "cut short" in refused(path)


def test_a_file_that_changed_since_is_refused(tmp_path):
    path = raw_file(tmp_path / "w.safetensors", {"w": entry()})
    stored = read_safetensors(path)["w"]
    path.unlink()
    with pytest.raises(InputError, match=r"'w' can't be read .*: the file has changed"):
        stored.read()


def test_flipped_bits_of_the_header_end_in_an_input_error_or_a_tensor(tmp_path):
    path = tmp_path / "w.safetensors"
    header = {"model.norm.weight": entry(0, 8, (2,)), "lm_head.weight": entry(8, 24, (2, 2))}
    raw = raw_file(path, header).read_bytes()
    assert len(read_safetensors(path)) == 2
    rng = np.random.default_rng(0)
    read = 0
    for _ in range(400):
        flipped = bytearray(raw)
        for place in rng.integers(0, len(raw) - 24, rng.integers(1, 4)):
            flipped[place] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            for stored in read_safetensors(path).values():
                assert stored.read().nbytes == stored.nbytes
            read += 1
        except InputError:
            pass
    assert 5 < read < 395
