import math
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llama_jax.convert.torch_file import TorchWriter, read_torch
from llama_jax.errors import InputError

DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float64": np.float64,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
}
SHAPES = [(), (0,), (3, 0, 2), (1,), (5,), (7, 3), (2, 1, 3, 2)]


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch")


def same(tensor, theirs):
    """Whether a PyTorch tensor is bit for bit the array read from a file."""
    torch = pytest.importorskip("torch")
    shape, dtype = tuple(theirs.shape), np.dtype(DTYPES[str(theirs.dtype).removeprefix("torch.")])
    array = tensor.read()
    assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype) == (shape, dtype)
    assert tensor.nbytes == array.nbytes == math.prod(shape) * dtype.itemsize
    assert not array.flags.writeable
    bits = theirs.detach().contiguous().reshape(-1).view(torch.uint8)
    return array.tobytes() == bits.numpy().tobytes()


def arrays():
    """Tensors of every dtype and of many shapes, of random bits."""
    rng = np.random.default_rng(0)
    found = {}
    for kind, dtype in DTYPES.items():
        for shape in SHAPES:
            size = math.prod(shape) * np.dtype(dtype).itemsize
            raw = rng.integers(0, 2 if kind == "bool" else 256, size, np.uint8)
            found[f"{kind}.{shape}"] = raw.view(dtype).reshape(shape)
    return found


def write(path, tensors):
    header = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    with TorchWriter(path, header) as file:
        for name, array in tensors.items():
            file.write(name, array)
    return path


def archive(path, data, entries=(("data/0", bytes(24)),), root="archive", **how):
    """A file as torch.save makes it, around any pickle and any storages."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in [("data.pkl", data), *entries, ("version", b"3\n")]:
            file.writestr(f"{root}/{name}", content, **how)
    return path


# Parts of pickles, in protocol 2.
def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key="0", numel=6, kind=b"ctorch\nFloatStorage\n"):
    return b"(" + text("storage") + kind + text(key) + text("cpu") + number(numel) + b"tQ"


HOOKS = b"ccollections\nOrderedDict\n)R"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def tensor(offset=0, shape=(2, 3), strides=(3, 1), store=None):
    arguments = number(offset) + numbers(shape) + numbers(strides) + b"\x89" + HOOKS
    return REBUILD + b"(" + (store or storage()) + arguments + b"tR"


def state_dict(value, name="w"):
    return b"\x80\x02}" + text(name) + value + b"s."


# Reading what torch.save wrote.


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_every_dtype_and_shape_as_torch_does(torch, tmp_path, protocol):
    path = tmp_path / "all.pth"
    write(tmp_path / "ours.pth", arrays())
    theirs = torch.load(tmp_path / "ours.pth")
    torch.save(theirs, path, pickle_protocol=protocol)
    ours = read_torch(path)
    assert list(ours) == list(theirs)
    assert all(same(ours[name], theirs[name]) for name in theirs)


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
    assert all(same(ours[name], theirs[name]) for name in theirs)


def test_reads_a_module_s_state_dict_with_its_metadata(torch, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).half()
    torch.save(model.state_dict(), tmp_path / "model.bin")
    assert hasattr(model.state_dict(), "_metadata")
    ours = read_torch(tmp_path / "model.bin")
    assert list(ours) == list(model.state_dict())
    assert all(same(ours[name], value) for name, value in model.state_dict().items())


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
    assert all(same(ours[name], value) for name, value in model.state_dict().items())


def test_passes_over_plain_values_and_refuses_others_by_name(torch, tmp_path):
    path = tmp_path / "mixed.pth"
    weight = torch.ones(2)
    torch.save({"w": weight, "step": 3, "rate": 0.5, "note": "x", "no": None, "ok": True}, path)
    assert list(read_torch(path)) == ["w"]
    torch.save({"w": weight, "sizes": weight.shape}, path)
    with pytest.raises(InputError, match="'sizes' is a tuple, not a tensor"):
        read_torch(path)
    torch.save({"w": weight, 3: weight}, path)
    with pytest.raises(InputError, match="3 is a Tensor, not a tensor with a name"):
        read_torch(path)
    torch.save([weight], path)
    with pytest.raises(InputError, match="holds a list, not a state dict"):
        read_torch(path)


@pytest.mark.parametrize("folder", ["stories260K", "meta_reference"])
def test_reads_real_checkpoints_bit_for_bit(torch, shared_data, folder):
    paths = sorted((shared_data / folder).rglob("consolidated.*.pth"))
    assert len(paths) == {"stories260K": 1, "meta_reference": 11}[folder]
    for path in paths:
        ours, theirs = read_torch(path), torch.load(path)
        assert list(ours) == list(theirs)
        assert all(same(ours[name], theirs[name]) for name in theirs)


def test_reads_entries_beyond_four_gigabytes(tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.random((4, 5)).astype(np.float32)
    small = write(tmp_path / "small.pth", {"w": weight})
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
    """Bytes of files in this process's memory."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc/self/status")
    (kilobytes,) = re.findall(r"RssFile:\s+(\d+) kB", status.read_text())
    return int(kilobytes) * 1024


def test_memory_falls_again_when_an_array_is_let_go(tmp_path):
    size = 32 << 20
    weight = np.ones(size, np.uint8)
    stored = read_torch(write(tmp_path / "w.pth", {"v": weight, "w": weight}))["w"]
    before = resident()
    array = stored.read()
    assert resident() < before + size // 8
    assert array.sum() == size
    assert resident() > before + size // 2
    del array
    assert resident() < before + size // 8


def test_a_file_that_changed_since_is_refused(tmp_path):
    path = write(tmp_path / "w.pth", {"w": np.ones(9, np.float32)})
    stored = read_torch(path)["w"]
    path.write_bytes(b"short")
    with pytest.raises(InputError, match=r"'w' can't be read .*: the file has changed"):
        stored.read()


# Writing.


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_is_written(torch, tmp_path, mmap):
    tensors = arrays()
    write(tmp_path / "consolidated.00.pth", tensors)
    theirs = torch.load(tmp_path / "consolidated.00.pth", weights_only=True, mmap=mmap)
    ours = read_torch(tmp_path / "consolidated.00.pth")
    assert list(theirs) == list(ours) == list(tensors)
    for name, array in tensors.items():
        assert ours[name].read().tobytes() == array.tobytes()
        assert same(ours[name], theirs[name])
        assert theirs[name].is_contiguous()


def test_storages_begin_at_multiples_of_64_and_checksums_hold(tmp_path):
    path = write(tmp_path / "a stëm.pth", arrays())
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        assert {i.compress_type for i in file.infolist()} == {zipfile.ZIP_STORED}
        names = file.namelist()
        offsets = [i.header_offset for i in file.infolist()]
    assert names[:3] == [f"a stëm/{name}" for name in ("data.pkl", "byteorder", "version")]
    assert names[3:] == [f"a stëm/data/{i}" for i in range(len(arrays()))]
    raw = path.read_bytes()
    ends = [o + 30 + sum(struct.unpack_from("<HH", raw, o + 26)) for o in offsets]
    assert {end % 64 for end in ends} == {0}


def test_what_is_written_depends_on_the_tensors_alone(tmp_path):
    (tmp_path / "other").mkdir()
    one = write(tmp_path / "w.pth", arrays()).read_bytes()
    assert write(tmp_path / "other" / "w.pth", arrays()).read_bytes() == one


def test_elements_in_any_order_are_written_in_row_major(tmp_path):
    weight = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    views = {"t": weight.T, "s": weight[:, ::2], "e": np.broadcast_to(weight[0, 0, 1], (3, 2))}
    ours = read_torch(write(tmp_path / "w.pth", views))
    for name, array in views.items():
        np.testing.assert_array_equal(ours[name].read(), array)


def test_writing_copies_nothing(tmp_path):
    weight = np.ones(8 << 20, np.uint8)
    tracemalloc.start()
    write(tmp_path / "w.pth", {"w": weight})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_writer_refuses_what_its_header_does_not_say(tmp_path):
    path, one = tmp_path / "w.pth", np.ones(2, np.float32)
    header = {"a": ((2,), np.float32), "b": ((2,), np.float32)}
    wrong = [
        ("b", one, "b was written where a was due"),
        ("a", one[:1], r"a is float32\(1,\), not float32\(2,\)"),
        ("a", one.astype(np.float16), r"a is float16\(2,\), not float32\(2,\)"),
    ]
    for name, array, message in wrong:
        with pytest.raises(ValueError, match=message), TorchWriter(path, header) as file:
            file.write(name, array)
    with pytest.raises(ValueError, match="lacks b"), TorchWriter(path, header) as file:
        file.write("a", one)
    with pytest.raises(ValueError, match="no complex64 tensor c"):
        TorchWriter(path, {"c": ((2,), np.complex64)})
    assert list(tmp_path.iterdir()) == []


# Refusals.


def refused(path):
    """The message with which a file is refused."""
    with pytest.raises(InputError) as caught:
        read_torch(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))
    return message


def test_other_formats_are_recognised_and_the_way_out_is_named(torch, tmp_path):
    path, weights = tmp_path / "w.pth", {"w": torch.ones(2)}
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    assert "from before PyTorch 1.6: load it with torch.load" in refused(path)
    archive(path, b"", [("constants.pkl", b"")])
    assert "TorchScript archive: load it with torch.jit.load" in refused(path)
    torch.save({"w": torch.ones(2, dtype=torch.uint16)}, path)
    assert "asks for 'torch._utils._rebuild_tensor_v3'" in refused(path)
    torch.save({"w": torch.ones(2, dtype=torch.complex64)}, path)
    assert "asks for 'torch.ComplexFloatStorage'" in refused(path)
    torch.save(torch.nn.Linear(2, 2), path)
    assert "asks for 'torch.nn.modules.linear.Linear'" in refused(path)


def test_files_that_are_none_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    assert "there is no" in refused(path)
    for content in (b"", b"P", b"\x80", b"\x80\x02}.", b"GGUF" * 30, b"version https://git-lfs"):
        path.write_bytes(content)
        assert "no PyTorch file of weights" in refused(path)
    path.write_bytes(b"PK" + bytes(500))
    assert "cut short or damaged" in refused(path)
    assert "can't be read" in refused(tmp_path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "a")
    assert "not of one PyTorch state dict" in refused(path)


def test_big_endian_compressed_and_oversized_files_are_refused(tmp_path):
    path, good = tmp_path / "w.pth", state_dict(tensor())
    storages = [("data/0", bytes(24))]
    assert read_torch(archive(path, good, [*storages, ("byteorder", b"little")]))["w"].nbytes == 24
    archive(path, good, [*storages, ("byteorder", b"big")])
    assert "big-endian" in refused(path)
    archive(path, good, compress_type=zipfile.ZIP_DEFLATED)
    assert "compressed or encrypted" in refused(path)
    archive(path, good.ljust((8 << 20) + 1))
    assert "too large for weights" in refused(path)
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive(path, good, storages * 2)
    assert "not of one PyTorch state dict" in refused(path)


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
        (tensor(shape=(2**62, 2**62), strides=(0, 0)), "beyond all bounds"),
        (tensor(shape=(2**70, 0)), "beyond all bounds"),
        (tensor(store=storage(numel=5)), "a storage of 24 bytes, not of 5 float32"),
        (tensor(store=storage(numel=-6)), "no tensor can have"),
        (tensor(store=storage(numel=2**62)), "a storage of 24 bytes"),
        (tensor(store=storage(kind=b"ctorch\nDoubleStorage\n")), "not of 6 float64"),
        (tensor(store=storage(key="1")), "lacks 'archive/data/1', which 'w' needs"),
        (tensor(store=storage(key="../data.pkl")), "lacks 'archive/data/../data.pkl'"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, value, why):
    assert why in refused(archive(tmp_path / "w.pth", state_dict(value)))


@pytest.mark.parametrize("stride", [0, 7, 2**62, 2**70])
def test_the_stride_of_a_length_of_one_means_nothing(tmp_path, stride):
    value = tensor(shape=(2, 1, 3), strides=(3, stride, 1))
    array = read_torch(archive(tmp_path / "w.pth", state_dict(value)))["w"].read()
    np.testing.assert_array_equal(array, np.zeros((2, 1, 3), np.float32))


def test_an_expanded_tensor_takes_no_memory_however_large(tmp_path):
    value = tensor(shape=(2**40, 3), strides=(0, 1))
    array = read_torch(archive(tmp_path / "w.pth", state_dict(value)))["w"].read()
    assert (array.shape, array.strides) == ((2**40, 3), (0, 4))


CANARY = "canary"
HOSTILE = {
    "os.system": b"cos\nsystem\n" + text(f"touch {CANARY}") + b"\x85R",
    "posix.system": b"cposix\nsystem\n" + text(f"touch {CANARY}") + b"\x85R",
    "subprocess.Popen": b"csubprocess\nPopen\n" + text(f"touch {CANARY}") + b"\x85R",
    "builtins.eval": b"cbuiltins\neval\n" + text(f"open('{CANARY}','w')") + b"\x85R",
    "__builtin__.exec": b"c__builtin__\nexec\n" + text(f"open('{CANARY}','w')") + b"\x85R",
    "builtins.getattr": b"cbuiltins\ngetattr\n(" + text("x") + text("y") + b"tR",
    "builtins.__import__": b"cbuiltins\n__import__\n" + text("os") + b"\x85R",
    "torch.load": b"ctorch\nload\n" + text(CANARY) + b"\x85R",
    "torch.hub.load": b"ctorch\nhub.load\n" + text(CANARY) + b"\x85R",
    "torch._utils._rebuild_tensor_v2.__globals__": (
        b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n)R"
    ),
    "collections.OrderedDict.__init__": b"ccollections\nOrderedDict.__init__\n)R",
    "collections .OrderedDict": b"ccollections \nOrderedDict\n)R",
    "runpy._run_code": b"\x8c\x05runpy\x8c\x09_run_code\x93)R",
    "numpy.core.multiarray._reconstruct": b"cnumpy.core.multiarray\n_reconstruct\n)R",
    "argparse.Namespace": b"cargparse\nNamespace\n)\x81",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_global_beyond_weights_is_refused_by_name_and_not_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    message = refused(archive(tmp_path / "w.pth", state_dict(HOSTILE[name])))
    assert f"asks for '{name}', which weights don't need (nothing was run)" in message
    assert not (tmp_path / CANARY).exists()


class Trick:
    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


def test_reduce_tricks_are_refused_in_every_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol in (2, 3, 4, 5):
        for value in (Trick(), {"w": Trick()}, [Trick()], {"w": {"model": Trick()}}):
            path = archive(tmp_path / "w.pth", pickle.dumps(value, protocol))
            assert ".system', which weights don't need" in refused(path)
    assert not (tmp_path / CANARY).exists()


DEEP = b"\x85" * 200_000
STRANGE = {
    "an opcode of text protocols": b"\x80\x02(I1\nl.",
    "an instance": b"(ios\nsystem\n.",
    "an object": b"(cos\nsystem\no.",
    "an extension": b"\x82\x01.",
    "a new object": state_dict(b"ccollections\nOrderedDict\n)\x81"),
    "an out-of-band buffer": b"\x80\x05\x97.",
    "attributes of a tensor": state_dict(tensor() + b"}" + text("shape") + b"Nsb"),
    "attributes of a function": state_dict(REBUILD + b"}b"),
    "attributes by a tuple": state_dict(HOOKS + b"N}\x86b"),
    "a call of text": state_dict(text("os.system") + b")R"),
    "a call of a tensor": state_dict(tensor() + b")R"),
    "a call of a storage type": state_dict(b"ctorch\nFloatStorage\n)R"),
    "a dict of items": state_dict(b"ccollections\nOrderedDict\n]\x85R"),
    "a call with a list": state_dict(REBUILD + b"]R"),
    "a call with nothing": state_dict(REBUILD + b")R"),
    "a negated tensor": state_dict(tensor()[:-2] + b"}" + text("neg") + b"\x88stR"),
    "a parameter of nothing": state_dict(b"ctorch._utils\n_rebuild_parameter\nN\x89N\x87R"),
    "a global without a name": state_dict(b"NN\x93"),
    "a persistent id of text": state_dict(text("0") + b"Q"),
    "a text persistent id": state_dict(b"P0\n"),
    "a persistent id of a module": state_dict(b"(" + text("module") + b"NNNtQ"),
    "a storage of no type": state_dict(tensor(store=storage(kind=text("FloatStorage")))),
    "a storage of a function": state_dict(tensor(store=storage(kind=REBUILD))),
    "a storage with a number for a key": state_dict(
        b"(" + text("storage") + b"ctorch\nFloatStorage\nK\x00" + text("cpu") + b"K\x06tQ"
    ),
    "a deep key": b"\x80\x02})" + DEEP + b"Ns.",
    "a deep value": state_dict(b")" + DEEP),
    "a deep shape": state_dict(tensor()[: -len(b"tR")].replace(numbers((2, 3)), b")" + DEEP)),
    "lists in lists": state_dict(b"]" * 200_000 + b"a" * 199_999),
    "a tensor for a key": b"\x80\x02}" + tensor() + b"Ns.",
    "None for a key": b"\x80\x02}NNs.",
    "a dict of itself": b"\x80\x02}q\x00" + text("w") + b"h\x00s.",
    "a list of itself": b"\x80\x02]q\x00h\x00a.",
    "a memo of four billion": state_dict(b"Nr\xff\xff\xff\xff" + HOOKS),
    "a memo never filled": state_dict(b"h\x07"),
    "text of four gigabytes": b"\x80\x02X\xff\xff\xff\xffabc.",
    "bytes of eight exabytes": b"\x80\x05\x8e" + b"\xff" * 7 + b"\x7f.",
    "a number of two gigabytes": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "text that is no UTF-8": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "half of a surrogate pair": b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80Ns.",
    "items for no dict": b"\x80\x02N(" + text("a") + b"Nu.",
    "an odd number of items": b"\x80\x02}(" + text("a") + b"u.",
    "items without a mark": b"\x80\x02}" + text("a") + b"Nu.",
    "an element for no list": b"\x80\x02}Na.",
    "a stack run dry": b"\x80\x02\x86.",
    "marks that overlap": b"\x80\x02NN(00t.",
    "no end": b"\x80\x02}",
    "nothing": b"",
    "an end alone": b".",
    "a number": b"\x80\x02K\x01.",
    "a name without an end": b"\x80\x02ctorch\nSize",
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_pickle_is_refused(tmp_path, name):
    assert refused(archive(tmp_path / "w.pth", STRANGE[name]))


def sample(tmp_path):
    """A file of three tensors, and what it holds."""
    rng = np.random.default_rng(1)
    tensors = {
        "tok_embeddings.weight": rng.random((40, 3)).astype(np.float32),
        "norm.weight": np.zeros(300, ml_dtypes.bfloat16),  # zeros look like empty extra fields
        "layers.0.w": rng.integers(0, 99, (7, 5), np.int64),
    }
    return write(tmp_path / "w.pth", tensors), tensors


def right_or_refused(path, tensors):
    try:
        ours = read_torch(path)
        read = {name: tensor.read() for name, tensor in ours.items()}
    except InputError:
        return False
    assert list(read) == list(tensors)
    assert all(read[name].tobytes() == array.tobytes() for name, array in tensors.items())
    return True


def test_a_file_cut_short_is_refused(tmp_path):
    path, tensors = sample(tmp_path)
    raw = path.read_bytes()
    assert right_or_refused(path, tensors)
    for length in {*range(0, len(raw), 61), *range(len(raw) - 80, len(raw))}:
        path.write_bytes(raw[:length])
        refused(path)


def test_a_directory_that_swaps_two_storages_is_refused(tmp_path):
    tensors = {name: np.full(9, i, np.float32) for i, name in enumerate("vw")}
    path = write(tmp_path / "w.pth", tensors)
    raw = bytearray(path.read_bytes())
    entries = [raw.rindex(b"w/data/%d" % i) for i in range(2)]
    offsets = [raw[entry - 4 : entry] for entry in entries]
    for entry, offset in zip(entries, reversed(offsets), strict=True):
        raw[entry - 4 : entry] = offset
    assert right_or_refused(path, tensors)
    path.write_bytes(raw)
    assert "isn't where the zip directory says" in refused(path)


def without_storages(path):
    """The numbers of the bytes of a file that don't belong to a storage."""
    places = set(range(path.stat().st_size))
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        for info in file.infolist():
            if "/data/" in info.filename:
                sizes = struct.unpack_from("<HH", raw, info.header_offset + 26)
                begin = info.header_offset + 30 + sum(sizes)
                places -= set(range(begin, begin + info.file_size))
    return sorted(places)


@pytest.mark.parametrize("writer", ["ours", "torch's"])
def test_flipped_bits_outside_the_storages_are_seen_or_harmless(tmp_path, request, writer):
    path, tensors = sample(tmp_path)
    if writer == "torch's":
        torch = request.getfixturevalue("torch")
        torch.save(torch.load(path), path)
    raw, places = path.read_bytes(), without_storages(path)
    rng = np.random.default_rng(2)
    right = 0
    for _ in range(300):
        flipped = bytearray(raw)
        for place in rng.choice(places, rng.integers(1, 4)):
            flipped[place] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        right += right_or_refused(path, tensors)
    assert 50 < right < 250


def test_flipped_bits_in_a_pickle_never_do_harm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    items = text("model.norm.weight") + tensor() + text("lm_head.weight") + tensor(1, (5,), (1,))
    pickles = [b"\x80\x02}(" + items + b"u.", state_dict(HOSTILE["posix.system"])]
    rng = np.random.default_rng(3)
    assert len(read_torch(archive(path, pickles[0]))) == 2
    read = 0
    for i in range(400):
        flipped = bytearray(pickles[i % 2])
        for place in rng.integers(0, len(flipped), rng.integers(1, 4)):
            flipped[place] = rng.integers(256) if rng.random() < 0.5 else flipped[place] ^ 1
        archive(path, bytes(flipped))
        try:
            for stored in read_torch(path).values():
                assert stored.read().nbytes == stored.nbytes
            read += 1
        except InputError:
            pass
    assert 0 < read < 390
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]
