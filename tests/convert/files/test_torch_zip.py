"""PyTorch's files: read bit for bit, and written so that PyTorch reads them."""

import math
import re
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from conftest import peer
from tensor_files import sample_arrays, write_tensors

from llama_jax.convert.files.torch_zip import read_torch
from llama_jax.errors import InputError


@pytest.fixture(scope="session")
def torch():
    return peer("torch")


def is_same(tensor, theirs):
    """Whether a tensor in a file has the shape, type and bits of a PyTorch tensor."""
    torch = peer("torch")
    shape, dtype = tuple(theirs.shape), np.dtype(str(theirs.dtype).removeprefix("torch."))
    array = tensor.read()
    assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype) == (shape, dtype)
    assert tensor.nbytes == array.nbytes == math.prod(shape) * dtype.itemsize
    assert not array.flags.writeable
    bits = theirs.detach().contiguous().reshape(-1).view(torch.uint8)
    return array.tobytes() == bits.numpy().tobytes()


# Reading files of torch.save.


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_every_dtype_and_shape_as_torch_does(torch, tmp_path, protocol):
    path = tmp_path / "all.pth"
    write_tensors(tmp_path / "ours.pth", sample_arrays())
    theirs = torch.load(tmp_path / "ours.pth")
    torch.save(theirs, path, pickle_protocol=protocol)
    ours = read_torch(path)
    assert list(ours) == list(theirs)
    assert all(is_same(ours[name], theirs[name]) for name in theirs)


def test_reads_views_shared_storages_and_parameters(torch, tmp_path):
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    half = torch.arange(10, dtype=torch.bfloat16)
    theirs = OrderedDict(
        base=base, transposed=base.T, rows=base[1:3], steps=base[::2, 1::3], scalar=base[2, 3],
        permuted=base.view(5, 3, 4).permute(2, 0, 1), diagonal=base.diagonal(),
        expanded=base[0:1].expand(4, 12), all_one=torch.ones(1).expand(2, 3, 4),
        windows=base.view(-1).unfold(0, 4, 2), empty=base[:0], beyond=base[5:, 7:],
        parameter=torch.nn.Parameter(base[3]), same_parameter=torch.nn.Parameter(base),
        half=half, half_end=half[7:], half_steps=half[1::3],
    )  # fmt: skip
    torch.save(theirs, tmp_path / "views.bin")
    ours = read_torch(tmp_path / "views.bin")
    assert list(ours) == list(theirs)
    assert all(is_same(ours[name], theirs[name]) for name in theirs)


def test_reads_a_module_s_state_dict_with_its_metadata(torch, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).half()
    torch.save(model.state_dict(), tmp_path / "model.bin")
    assert hasattr(model.state_dict(), "_metadata")
    ours = read_torch(tmp_path / "model.bin")
    assert list(ours) == list(model.state_dict())
    assert all(is_same(ours[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_reads_the_state_dict_inside_a_training_checkpoint(torch, tmp_path, key):
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    run = {"optimizer": optimizer.state_dict(), key: model.state_dict(), "step": 7, "best": 0.5}
    torch.save(run, tmp_path / "run.pt")
    ours = read_torch(tmp_path / "run.pt")
    assert list(ours) == ["weight", "bias"]
    assert all(is_same(ours[name], value) for name, value in model.state_dict().items())


def test_ignores_plain_values_and_refuses_others_by_name(torch, tmp_path):
    path = tmp_path / "mixed.pth"
    weight = torch.ones(2)
    torch.save({"w": weight, "step": 3, "rate": 0.5, "note": "x", "no": None, "ok": True}, path)
    assert list(read_torch(path)) == ["w"]
    torch.save({"w": weight, "sizes": weight.shape}, path)
    with pytest.raises(InputError, match="'sizes' is a tuple, not a tensor"):
        read_torch(path)
    torch.save({"w": weight, 3: weight}, path)
    with pytest.raises(InputError, match="the key 3 is not a string"):
        read_torch(path)
    torch.save([weight], path)
    with pytest.raises(InputError, match="contains a list, not a state dict"):
        read_torch(path)


@pytest.mark.parametrize("folder", ["stories260K", "meta_reference"])
def test_reads_real_checkpoints_bit_for_bit(torch, shared_data, folder):
    paths = sorted((shared_data / folder).rglob("consolidated.*.pth"))
    assert len(paths) == {"stories260K": 1, "meta_reference": 11}[folder]
    for path in paths:
        ours, theirs = read_torch(path), torch.load(path)
        assert list(ours) == list(theirs)
        assert all(is_same(ours[name], theirs[name]) for name in theirs)


def test_reads_entries_beyond_four_gigabytes(tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.random((4, 5)).astype(np.float32)
    small = write_tensors(tmp_path / "small.pth", {"w": weight})
    large = tmp_path / "large.pth"
    with open(large, "wb") as file:
        file.write(b"PK")
        file.truncate(5 << 30)  # a hole: it takes no space
    with zipfile.ZipFile(small) as source, zipfile.ZipFile(large, "a") as target:
        for info in source.infolist():
            with target.open(zipfile.ZipInfo(info.filename), "w", force_zip64=True) as entry:
                entry.write(source.read(info))
    assert large.stat().st_size > 5 << 30
    np.testing.assert_array_equal(read_torch(large)["w"].read(), weight)


def resident() -> int:
    """Returns the bytes of mapped files in this process's memory."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc/self/status")
    # Files of a folder in memory count as shared memory.
    kilobytes = re.findall(r"Rss(?:File|Shmem):\s+(\d+) kB", status.read_text())
    return sum(map(int, kilobytes)) * 1024


def test_memory_is_released_with_the_array(tmp_path):
    size = 32 << 20
    weight = np.ones(size, np.uint8)
    stored = read_torch(write_tensors(tmp_path / "w.pth", {"v": weight, "w": weight}))["w"]
    before = resident()
    array = stored.read()
    assert resident() < before + size // 8
    assert array.sum() == size
    assert resident() > before + size // 2
    del array
    assert resident() < before + size // 8


# Writing.


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_our_file(torch, tmp_path, mmap):
    tensors = sample_arrays()
    write_tensors(tmp_path / "consolidated.00.pth", tensors)
    theirs = torch.load(tmp_path / "consolidated.00.pth", weights_only=True, mmap=mmap)
    ours = read_torch(tmp_path / "consolidated.00.pth")
    assert list(theirs) == list(ours) == list(tensors)
    for name, array in tensors.items():
        assert ours[name].read().tobytes() == array.tobytes()
        assert is_same(ours[name], theirs[name])
        assert theirs[name].is_contiguous()


def test_storages_begin_at_multiples_of_64_and_checksums_are_right(tmp_path):
    path = write_tensors(tmp_path / "a stëm.pth", sample_arrays())
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        assert {i.compress_type for i in file.infolist()} == {zipfile.ZIP_STORED}
        names = file.namelist()
        offsets = [i.header_offset for i in file.infolist()]
    assert names[:3] == [f"a stëm/{name}" for name in ("data.pkl", "byteorder", "version")]
    assert names[3:] == [f"a stëm/data/{i}" for i in range(len(sample_arrays()))]
    raw = path.read_bytes()
    ends = [o + 30 + sum(struct.unpack_from("<HH", raw, o + 26)) for o in offsets]
    assert {end % 64 for end in ends} == {0}


def test_the_bytes_of_a_file_depend_only_on_the_tensors(tmp_path):
    (tmp_path / "other").mkdir()
    one = write_tensors(tmp_path / "w.pth", sample_arrays()).read_bytes()
    assert write_tensors(tmp_path / "other" / "w.pth", sample_arrays()).read_bytes() == one


def test_writing_does_not_copy_the_array(tmp_path):
    weight = np.ones(8 << 20, np.uint8)
    tracemalloc.start()
    write_tensors(tmp_path / "w.pth", {"w": weight})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
