"""Files in PyTorch's format: valid ones, and ones with any pickle and any entries."""

import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
from tensor_files import write_tensors


def write_archive(path, data, entries=(("data/0", bytes(24)),), root="archive", **options):
    """Writes a file in torch.save's layout, with any pickle and storages; returns its path."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in [("data.pkl", data), *entries, ("version", b"3\n")]:
            file.writestr(f"{root}/{name}", content, **options)
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


def write_sample(tmp_path):
    """Writes a file of three tensors; returns its path and the tensors."""
    rng = np.random.default_rng(1)
    tensors = {
        "tok_embeddings.weight": rng.random((40, 3)).astype(np.float32),
        # A reader could mistake these zeros for empty extra fields of ZIP.
        "norm.weight": np.zeros(300, ml_dtypes.bfloat16),
        "layers.0.w": rng.integers(0, 99, (7, 5), np.int64),
    }
    return write_tensors(tmp_path / "w.pth", tensors), tensors
