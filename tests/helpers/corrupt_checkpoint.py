"""Functions that corrupt a checkpoint, in its headers, configuration or set of files.

Each takes the path of a copy of a valid checkpoint and a random generator, and may return options
for the conversion.
"""

import copy
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from sample_checkpoints import (
    GGUF_SHAPE,
    GGUF_TENSORS,
    GGUF_TOKENIZER,
    read_tensors,
    write_gguf,
)
from tensor_files import write_tensors

Rng = np.random.Generator
Options = Mapping[str, Any] | None
WEIGHTS = (".pth", ".safetensors", ".bin", ".gguf")
STRANGE = (
    *("-1", "0", "1000000000000", "1e400", "-1e400", "NaN", "0.5", "true", "null", '"x"', '""'),
    *("[]", "[[[1]]]", "{}", '{"a": {}}', "1" * 4000, f'"{"x" * 5000}"', '["a", null]', "1e-400"),
)


def choose(rng: Rng, values: Any) -> Any:
    values = list(values)
    return values[rng.integers(len(values))]


def files(checkpoint: Path, *endings: str) -> list[Path]:
    """Returns the files of a checkpoint whose names have one of the endings; without any, all."""
    if checkpoint.is_file():
        paths = [checkpoint]
    else:
        paths = sorted(p for p in checkpoint.rglob("*") if p.is_file())
    return [p for p in paths if p.name.endswith(endings or "")]


def truncate_file(checkpoint: Path, rng: Rng) -> None:
    path = choose(
        rng, [p for p in files(checkpoint) if p.stat().st_size and p.name != "receipt.json"]
    )
    os.truncate(path, int(rng.integers(path.stat().st_size)))


def empty_file(checkpoint: Path, rng: Rng) -> None:
    endings = (*WEIGHTS, "params.json", "config.json", ".index.json", "zarr.json", "config.yaml")
    os.truncate(choose(rng, files(checkpoint, *endings, "model/_METADATA")), 0)


def header_offsets(path: Path) -> list[int]:
    """Returns the offsets of the bytes that describe a file's tensors: offset, shape, dtype."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        return list(range(8 + int.from_bytes(data[:8], "little")))
    if data[:2] == b"PK":
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            pickled = range(infos[0].header_offset, infos[1].header_offset)
            names = [i.header_offset + n for i in infos for n in range(30 + len(i.filename))]
            return [*pickled, *names, *range(archive.start_dir, len(data))]
    if path.suffix == ".gguf":
        reader = gguf.GGUFReader(path)
        spans = [(0, 24)]
        spans += [(f.offset, sum(p.nbytes for p in f.parts[:3])) for f in reader.fields.values()]
        spans += [(t.field.offset, sum(p.nbytes for p in t.field.parts)) for t in reader.tensors]
        return [at for begin, size in spans for at in range(begin, begin + size)]
    if path.suffix == ".bin":
        return list(range(32 if data[:4] == b"24ka" else 28))
    return list(range(len(data)))


def flip_header_bits(checkpoint: Path, rng: Rng) -> None:
    path = choose(rng, files(checkpoint, *WEIGHTS, ".index.json", "zarr.json", "model/_METADATA"))
    data = bytearray(path.read_bytes())
    for at in rng.choice(header_offsets(path), rng.integers(1, 4)):
        data[at] ^= int(1 << rng.integers(8)) if rng.random() < 0.5 else int(rng.integers(1, 256))
    path.write_bytes(data)


def delete_file(checkpoint: Path, rng: Rng) -> None:
    """Deletes a required file."""
    needed = [
        p for p in files(checkpoint) if p.name in ("params.json", "config.json", "config.yaml")
    ]
    needed += [
        p for p in files(checkpoint, *WEIGHTS, "zarr.json", "model/_METADATA") if p != checkpoint
    ]
    needed += [p for p in files(checkpoint) if "c" in p.parent.relative_to(checkpoint).parts]
    choose(rng, needed).unlink()


def change_json_value(checkpoint: Path, rng: Rng) -> None:
    """Sets a value of the configuration, or of the list of arrays, to an unexpected one."""
    names = ("params.json", "config.json", ".index.json", "zarr.json", "model/_METADATA")
    path = choose(rng, {p.name: p for p in files(checkpoint, *names)}.values())
    content = json.loads(path.read_text())
    if path.name in ("params.json", "config.json") and rng.random() < 0.4:
        content |= dict.fromkeys(("rope_theta", "n_kv_heads", "ffn_dim_multiplier", "head_dim"))
        content |= {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "eos_token_id": 2}
    parts = [content]
    while rng.random() < 0.5 and (inner := [v for v in parts[-1].values() if isinstance(v, dict)]):
        parts.append(choose(rng, [v for v in inner if v] or [content]))
    parts[-1][choose(rng, parts[-1])] = "here"
    path.write_text(json.dumps(content).replace('"here"', choose(rng, STRANGE)))


def change_gguf_metadata(checkpoint: Path, rng: Rng) -> None:
    """Sets a value of a GGUF file's metadata to an unexpected one."""
    kind = "F32" if checkpoint.name.startswith("f32") else "Q8_0"
    keys = [f"llama.{key}" for key in GGUF_SHAPE] + (list(GGUF_TOKENIZER) if kind == "Q8_0" else [])
    keys += ["general.alignment", "split.count", "llama.attention.key_length"]
    strange = [-1, 0, 10**12, float("nan"), float("inf"), "x", True, [1.5], ["a"], "x" * 5000]
    write_gguf(checkpoint, GGUF_TENSORS, kind, **{choose(rng, keys): choose(rng, strange)})


def change_llama2c_header(checkpoint: Path, rng: Rng) -> None:
    """Changes a number in the header of a llama2.c file."""
    data = bytearray(checkpoint.read_bytes())
    at = (8 if data[:4] == b"24ka" else 0) + 4 * int(rng.integers(6))
    struct.pack_into("<i", data, at, choose(rng, [-1, 0, 1, 7, 2**31 - 1, -(2**31), 1 << 20]))
    checkpoint.write_bytes(data)


def tensor_change(
    change: Callable[[dict[str, np.ndarray], Rng], Any],
) -> Callable[[Path, Rng], None]:
    """Returns the function that applies `change` to the tensors in one file of a checkpoint."""

    def corrupt(checkpoint: Path, rng: Rng) -> None:
        path = choose(rng, files(checkpoint, *WEIGHTS))
        tensors = copy.deepcopy(GGUF_TENSORS) if path.suffix == ".gguf" else read_tensors(path)
        change(tensors, rng)
        path.unlink()
        if path.suffix == ".gguf":
            write_gguf(path, tensors, "F32" if path.stem == "f32" else "Q8_0")
        else:
            write_tensors(path, tensors)

    corrupt.__name__ = change.__name__
    return corrupt


def pick_name(tensors: Mapping[str, np.ndarray], rng: Rng, ndim: int = 0) -> str:
    """Returns the name of a tensor; with ndim 2, of a matrix that is not square."""
    fit = [n for n, a in tensors.items() if ndim != 2 or (a.ndim == 2 and len(set(a.shape)) == 2)]
    return choose(rng, fit)


@tensor_change
def drop_tensor(tensors, rng):
    is_gguf = "token_embd.weight" in tensors  # a GGUF file without a head is a valid tied model
    del tensors[choose(rng, [n for n in tensors if not (is_gguf and n == "output.weight")])]


@tensor_change
def rename_tensor(tensors, rng):
    old = pick_name(tensors, rng)
    strange = ["", "x", "a\nb", "é" * 400, old + ".bias", old.replace("weight", "w"), old.upper()]
    tensors[choose(rng, strange)] = tensors.pop(old)


@tensor_change
def add_tensor(tensors, rng):
    name = pick_name(tensors, rng)
    number = str(int(rng.integers(2, 10**9)))
    other = re.sub(r"\d", number, name) if re.search(r"\d", name) else name + number
    tensors[choose(rng, [other, other, "a\nb", "x" * 9000])] = tensors[name]


@tensor_change
def transpose_tensor(tensors, rng):
    name = pick_name(tensors, rng, ndim=2)
    tensors[name] = np.ascontiguousarray(tensors[name].T)


@tensor_change
def reshape_tensor(tensors, rng):
    name = pick_name(tensors, rng)
    array = tensors[name]
    shapes = [array[:0], array[:-1], array[None], array.reshape(-1, 2), np.concatenate([array] * 2)]
    tensors[name] = np.ascontiguousarray(choose(rng, [a for a in shapes if a.size or len(a) == 0]))


@tensor_change
def change_dtype(tensors, rng):
    name = pick_name(tensors, rng)
    tensors[name] = tensors[name].astype(choose(rng, [np.int32, np.float64, np.int8, np.int64]))


@tensor_change
def add_non_finite(tensors, rng):
    array = tensors[pick_name(tensors, rng)].reshape(-1)
    array[rng.integers(array.size)] = choose(rng, [np.nan, np.inf, -np.inf])


def change_one_shard(checkpoint: Path, rng: Rng) -> None:
    """Changes a norm in one shard, and sometimes its dtypes, so that the shards disagree."""
    path = choose(rng, files(checkpoint, ".pth"))
    tensors = read_tensors(path)
    norm = choose(rng, [n for n in tensors if "norm" in n])
    tensors[norm][rng.integers(32)] += 1
    if rng.random() < 0.3:
        tensors = {n: a.astype(np.float16) for n, a in tensors.items()}
    path.unlink()
    write_tensors(path, tensors)


def swap_files(checkpoint: Path, rng: Rng) -> None:
    a, b = rng.choice(files(checkpoint, *WEIGHTS), 2, replace=False)
    a.rename(checkpoint / "swap")
    b.rename(a)
    (checkpoint / "swap").rename(b)


def replace_weights_file(checkpoint: Path, rng: Rng) -> None:
    """Replaces a file of weights by that of a model with other weights or another shape."""
    other = checkpoint.parent.parent / "intact" / "other"
    path = choose(rng, files(checkpoint, *WEIGHTS))
    if path.suffix == ".pth":
        shutil.copy(other / f"meta{rng.integers(2)}" / path.name, path)
    else:
        # Of the other shape: a file with other weights of the same shape is valid.
        tensors = read_tensors(other / "hf1/model.safetensors")
        names = read_tensors(path)
        path.unlink()
        write_tensors(path, {name: tensors[name] for name in names})


def add_shard(checkpoint: Path, rng: Rng) -> None:
    """Adds a shard, with a number that follows, leaves a gap or occurs twice."""
    path = choose(rng, files(checkpoint, ".pth"))
    i = choose(rng, [1, 2, 3, 7, 10**9])
    target = checkpoint / f"consolidated.{i:02d}.pth"
    shutil.copy(path, checkpoint / "consolidated.000.pth" if target.exists() else target)


def change_index(checkpoint: Path, rng: Rng) -> None:
    """Makes the index lack a tensor, name one too many, or name a wrong or invalid file."""
    (path,) = files(checkpoint, ".index.json")
    content = json.loads(path.read_text())
    weight_map = content["weight_map"]
    names = list(weight_map)
    name = choose(rng, names)
    other = next(file for file in weight_map.values() if file != weight_map[name])
    wrong = ["gone.bin", "../x", "/etc/passwd", "..", "", "x" * 300, "a\0b", "\ud800", "a\nb"]
    wrong += [7, None]
    strange = [other, *wrong, *wrong, *wrong]
    if rng.random() < 0.2:
        del weight_map[name]
    elif rng.random() < 0.2:
        weight_map[f"{name}.more"] = weight_map[name]
    else:
        weight_map[name] = choose(rng, strange)
    path.write_text(json.dumps(content))


def repickle(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Changes the pickle in a PyTorch file, and updates the checksums."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def claim_huge_size(checkpoint: Path, rng: Rng) -> None:
    """Makes a header claim a size larger than any memory."""
    many = int(choose(rng, [1 << 31, 10**9, 1 << 60, (1 << 63) - 1]))
    path = choose(rng, files(checkpoint, "params.json", "config.json", *WEIGHTS))
    if path.suffix == ".json":
        keys = ("n_layers", "num_hidden_layers", "dim", "hidden_size", "n_heads", "head_dim")
        text = path.read_text()
        key = choose(rng, [key for key in keys if f'"{key}"' in text])
        path.write_text(re.sub(rf'("{key}": )\d+', rf"\g<1>{many}", text))
    elif path.suffix == ".gguf":
        data = bytearray(path.read_bytes())
        reader = gguf.GGUFReader(path)
        field, tensor = reader.fields["llama.block_count"], choose(rng, reader.tensors)
        array = b"\t\0\0\0" + choose(rng, [b"\4\0\0\0", b"\0\0\0\0", b"\t\0\0\0", b"\x08\0\0\0"])
        at = field.offset + sum(part.nbytes for part in field.parts[:2])
        dims = tensor.field.offset + tensor.field.parts[0].nbytes + len(tensor.name) + 4
        claims = [(8, b""), (16, b""), (24, b""), (dims, b""), (at, array), (at, array)]
        start, before = choose(rng, claims)
        data[start : start + len(before) + 8] = before + many.to_bytes(8, "little")
        path.write_bytes(data)
    elif path.suffix == ".safetensors":
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header[pick_name({n: np.zeros(2) for n in header if "." in n}, rng)]["shape"] = [many, many]
        raw = json.dumps(header).encode()
        tail = data[8 + int.from_bytes(data[:8], "little") :]
        length = choose(rng, [len(raw), len(raw), many])
        path.write_bytes(length.to_bytes(8, "little") + raw + tail)
    else:
        number = pickle.dumps(many, 2)[2:-1]
        repickle(path, lambda data: data.replace(b"K ", number, int(rng.integers(1, 9))))


def change_layer_count(checkpoint: Path, rng: Rng) -> None:
    """Changes the shape of a stacked array: other or very many layers, or a wrong rank."""
    path = choose(rng, [p for p in files(checkpoint, "zarr.json") if ".w" in p.parent.name])
    content = json.loads(path.read_text())
    shape = content["shape"]
    shapes = [[], [10**12, *shape[1:]], [1, *shape[1:]], [*shape, 1], [0, *shape[1:]], [2**62] * 4]
    path.write_text(json.dumps(content | {"shape": choose(rng, shapes)}))
