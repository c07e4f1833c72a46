"""Pickles with functions that weights don't need are refused by name; nothing in them is run."""

import os
import pickle

import numpy as np
import pytest
from tensor_files import read_error
from torch_files import (
    HOOKS,
    REBUILD,
    numbers,
    state_dict,
    storage,
    tensor,
    text,
    write_archive,
)

from llama_jax.convert.files.torch_zip import read_torch
from llama_jax.errors import InputError

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
def test_a_function_that_weights_do_not_need_is_refused_by_name_and_not_run(
    tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    message = read_error(write_archive(tmp_path / "w.pth", state_dict(HOSTILE[name])))
    assert f"asks for '{name}', which weights don't need (nothing was run)" in message
    assert not (tmp_path / CANARY).exists()


class RunsCommand:
    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


def test_objects_that_run_a_command_are_refused_in_every_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol in (2, 3, 4, 5):
        hostile = RunsCommand()
        for value in (hostile, {"w": hostile}, [hostile], {"w": {"model": hostile}}):
            path = write_archive(tmp_path / "w.pth", pickle.dumps(value, protocol))
            assert ".system', which weights don't need" in read_error(path)
    assert not (tmp_path / CANARY).exists()


DEEP = b"\x85" * 200_000
INVALID = {
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
    "numbers of one hash for keys": b"\x80\x02}(\x8a\x08" + bytes(7) + b"\x20Nu.",
    "a dict of itself": b"\x80\x02}q\x00" + text("w") + b"h\x00s.",
    "a list of itself": b"\x80\x02]q\x00h\x00a.",
    "a memo of four billion": state_dict(b"Nr\xff\xff\xff\xff" + HOOKS),
    "a memo never filled": state_dict(b"h\x07"),
    "text of four gigabytes": b"\x80\x02X\xff\xff\xff\xffabc.",
    "bytes of eight exabytes": b"\x80\x05\x8e" + b"\xff" * 7 + b"\x7f.",
    "a number of two gigabytes": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "text that is no UTF-8": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "half of a surrogate pair": b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80Ns.",
    "items for a value that is no dict": b"\x80\x02N(" + text("a") + b"Nu.",
    "an odd number of items": b"\x80\x02}(" + text("a") + b"u.",
    "items without a mark": b"\x80\x02}" + text("a") + b"Nu.",
    "an element for a value that is no list": b"\x80\x02}Na.",
    "a stack run dry": b"\x80\x02\x86.",
    "marks that overlap": b"\x80\x02NN(00t.",
    "no end": b"\x80\x02}",
    "nothing": b"",
    "an end alone": b".",
    "a number": b"\x80\x02K\x01.",
    "a name without an end": b"\x80\x02ctorch\nSize",
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_pickle_is_refused(tmp_path, name):
    assert read_error(write_archive(tmp_path / "w.pth", INVALID[name]))


def test_flipped_bits_in_a_pickle_end_in_an_input_error_or_tensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    items = text("model.norm.weight") + tensor() + text("lm_head.weight") + tensor(1, (5,), (1,))
    pickles = [b"\x80\x02}(" + items + b"u.", state_dict(HOSTILE["posix.system"])]
    rng = np.random.default_rng(3)
    assert len(read_torch(write_archive(path, pickles[0]))) == 2
    read = 0
    for case in range(400):
        flipped = bytearray(pickles[case % 2])
        for i in rng.integers(0, len(flipped), rng.integers(1, 4)):
            flipped[i] = rng.integers(256) if rng.random() < 0.5 else flipped[i] ^ 1
        write_archive(path, bytes(flipped))
        try:
            for stored in read_torch(path).values():
                assert stored.read().nbytes == stored.nbytes
            read += 1
        except InputError:
            pass
    assert 0 < read < 390
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]
