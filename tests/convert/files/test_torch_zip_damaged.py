"""Damaged and foreign files are refused; files whose tensors are intact are read."""

import struct
import zipfile
import zlib

import numpy as np
import pytest
from conftest import peer
from corrupt_weights import storage_offsets
from tensor_files import read_error, write_tensors
from torch_files import state_dict, storage, tensor, text, write_archive, write_sample

from llama_jax.convert.files.torch_zip import read_torch
from llama_jax.errors import InputError


def test_other_formats_are_refused_with_the_way_to_convert_them(tmp_path):
    torch = peer("torch")
    path, weights = tmp_path / "w.pth", {"w": torch.ones(2)}
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    assert "from before PyTorch 1.6: load it with torch.load" in read_error(path)
    write_archive(path, b"", [("constants.pkl", b"")])
    assert "TorchScript archive: load it with torch.jit.load" in read_error(path)
    torch.save({"w": torch.ones(2, dtype=torch.uint16)}, path)
    assert "asks for 'torch._utils._rebuild_tensor_v3'" in read_error(path)
    torch.save({"w": torch.ones(2, dtype=torch.complex64)}, path)
    assert "asks for 'torch.ComplexFloatStorage'" in read_error(path)
    torch.save(torch.nn.Linear(2, 2), path)
    assert "asks for 'torch.nn.modules.linear.Linear'" in read_error(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    assert "there is no" in read_error(path)
    for content in (b"", b"P", b"\x80", b"\x80\x02}.", b"GGUF" * 30, b"version https://git-lfs"):
        path.write_bytes(content)
        assert "not a PyTorch weight file" in read_error(path)
    path.write_bytes(b"PK" + bytes(500))
    assert "cut short or damaged" in read_error(path)
    assert "is a directory, not a regular file" in read_error(tmp_path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "a")
    assert "not of one PyTorch state dict" in read_error(path)


def test_big_endian_compressed_and_oversized_files_are_refused(tmp_path):
    path, good = tmp_path / "w.pth", state_dict(tensor())
    storages = [("data/0", bytes(24))]
    assert (
        read_torch(write_archive(path, good, [*storages, ("byteorder", b"little")]))["w"].nbytes
        == 24
    )
    write_archive(path, good, [*storages, ("byteorder", b"big")])
    assert "big-endian" in read_error(path)
    write_archive(path, good, compress_type=zipfile.ZIP_DEFLATED)
    assert "compressed or encrypted" in read_error(path)
    write_archive(path, good.ljust((8 << 20) + 1))
    assert "too large for weights" in read_error(path)
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_archive(path, good, storages * 2)
    assert "not of one PyTorch state dict" in read_error(path)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (tensor(offset=1), "'w' reaches beyond its storage"),
        (tensor(shape=(3, 3)), "'w' reaches beyond its storage"),
        (tensor(strides=(4, 1)), "'w' reaches beyond its storage"),
        (tensor(strides=(2**62, 1)), "'w' reaches beyond its storage"),
        (tensor(offset=-1), "no tensor can have"),
        (tensor(shape=(2, -3)), "no tensor can have"),
        (tensor(strides=(3, -1)), "no tensor can have"),
        (tensor(strides=(3,)), "no tensor can have"),
        (tensor(shape=(2, 1.5)), "no tensor can have"),
        (tensor(shape=(True, 3)), "no tensor can have"),
        (tensor(shape=(1,) * 40, strides=(0,) * 40), "no tensor can have"),
        (tensor(shape=(2**62, 2**62), strides=(0, 0)), "beyond NumPy's limits"),
        (tensor(shape=(2**70, 0)), "beyond NumPy's limits"),
        (tensor(store=storage(numel=5)), "a storage of 24 bytes, not of 5 float32"),
        (tensor(store=storage(numel=-6)), "no tensor can have"),
        (tensor(store=storage(numel=2**62)), "a storage of 24 bytes"),
        (tensor(store=storage(kind=b"ctorch\nDoubleStorage\n")), "not of 6 float64"),
        (tensor(store=storage(key="1")), "lacks 'archive/data/1', which 'w' needs"),
        (tensor(store=storage(key="../data.pkl")), "lacks 'archive/data/../data.pkl'"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, value, why):
    assert why in read_error(write_archive(tmp_path / "w.pth", state_dict(value)))


@pytest.mark.parametrize("stride", [0, 7, 2**62, 2**70])
def test_the_stride_of_a_length_of_one_has_no_effect(tmp_path, stride):
    value = tensor(shape=(2, 1, 3), strides=(3, stride, 1))
    array = read_torch(write_archive(tmp_path / "w.pth", state_dict(value)))["w"].read()
    np.testing.assert_array_equal(array, np.zeros((2, 1, 3), np.float32))


def test_an_expanded_tensor_of_any_size_takes_no_memory(tmp_path):
    value = tensor(shape=(2**40, 3), strides=(0, 1))
    array = read_torch(write_archive(tmp_path / "w.pth", state_dict(value)))["w"].read()
    assert (array.shape, array.strides) == ((2**40, 3), (0, 4))


def is_read_correctly(path, tensors):
    """Whether a file is read; False if it is refused. Asserts that the tensors are right."""
    try:
        ours = read_torch(path)
        read = {name: tensor.read() for name, tensor in ours.items()}
    except InputError:
        return False
    assert list(read) == list(tensors)
    assert all(read[name].tobytes() == array.tobytes() for name, array in tensors.items())
    return True


def test_a_file_cut_short_is_refused(tmp_path):
    path, tensors = write_sample(tmp_path)
    raw = path.read_bytes()
    assert is_read_correctly(path, tensors)
    for length in {*range(0, len(raw), 61), *range(len(raw) - 80, len(raw))}:
        path.write_bytes(raw[:length])
        read_error(path)


def test_a_directory_that_swaps_two_storages_is_refused(tmp_path):
    tensors = {name: np.full(9, i, np.float32) for i, name in enumerate("vw")}
    path = write_tensors(tmp_path / "w.pth", tensors)
    raw = bytearray(path.read_bytes())
    entries = [raw.rindex(b"w/data/%d" % i) for i in range(2)]
    offsets = [raw[entry - 4 : entry] for entry in entries]
    for entry, offset in zip(entries, reversed(offsets), strict=True):
        raw[entry - 4 : entry] = offset
    assert is_read_correctly(path, tensors)
    path.write_bytes(raw)
    assert "isn't at the offset in the zip directory" in read_error(path)


def without_storages(path):
    """Returns the offsets of the bytes of a file that don't belong to a storage."""
    return sorted(set(range(path.stat().st_size)) - set(storage_offsets(path)))


def test_a_flipped_bit_of_any_storage_is_refused(shared_data, tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "w.pth"
    for source in sorted((shared_data / "meta_reference").rglob("*.pth")):
        raw, offsets = source.read_bytes(), storage_offsets(source)
        for at in rng.choice(offsets, 10):
            flipped = bytearray(raw)
            flipped[at] ^= 1 << rng.integers(8)
            path.write_bytes(flipped)
            (message,) = filter(None, map(tensor_error, read_torch(path).values()))
            assert "is damaged (its checksum differs): fetch the file" in message


def tensor_error(stored):
    """Returns the message of the error that reading a tensor raises, or None."""
    try:
        stored.read()
    except InputError as error:
        return str(error)


def test_a_storage_that_tensors_share_is_hashed_once(tmp_path, monkeypatch):
    two = {"v": tensor(), "w": tensor(offset=3, shape=(3,), strides=(1,))}
    data = b"\x80\x02}(" + b"".join(text(name) + value for name, value in two.items()) + b"u."
    tensors = read_torch(write_archive(tmp_path / "w.pth", data))
    calls = []
    crc32 = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda *args: calls.append(args) or crc32(*args))
    assert [stored.read().shape for stored in tensors.values() for _ in range(2)] == [
        *((2, 3), (2, 3)),
        *((3,), (3,)),
    ]
    assert len(calls) == 1


def test_a_file_without_checksums_is_refused(tmp_path):
    torch = peer("torch")
    path = tmp_path / "w.pth"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(2)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert "was saved without checksums: load it with torch.load and save it" in read_error(path)


def test_a_directory_without_an_end_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    size = 256 << 30
    with open(path, "wb") as file:
        file.write(b"PK\3\4")
        file.truncate(size)  # a hole: it takes no space
        file.seek(size)
        # A directory in ZIP64 that claims all the bytes before it.
        file.write(struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size, 0))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, size, 1))
        file.write(struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, 2**32 - 1, 2**32 - 1, 0))
    assert "is cut short or damaged (its zip directory can't be read)" in read_error(path)


@pytest.mark.parametrize("writer", ["ours", "torch's"])
def test_flipped_bits_outside_the_storages_are_detected_or_harmless(tmp_path, writer):
    path, tensors = write_sample(tmp_path)
    if writer == "torch's":
        torch = peer("torch")
        torch.save(torch.load(path), path)
    raw, offsets = path.read_bytes(), without_storages(path)
    rng = np.random.default_rng(2)
    read = 0
    for _ in range(300):
        flipped = bytearray(raw)
        for at in rng.choice(offsets, rng.integers(1, 4)):
            flipped[at] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        read += is_read_correctly(path, tensors)
    assert 50 < read < 250
