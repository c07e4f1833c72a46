"""Ways to break a checkpoint.

Each takes a copy of a whole one and what it draws from, and returns options of the conversion.
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
from sample_checkpoints import GGUF_TENSORS, SAID, SHAPE, read, write, write_gguf

Rng = np.random.Generator
Options = Mapping[str, Any] | None
WEIGHTS = (".pth", ".safetensors", ".bin", ".gguf")
STRANGE = (
    *("-1", "0", "1000000000000", "1e400", "-1e400", "NaN", "0.5", "true", "null", '"x"', '""'),
    *("[]", "[[[1]]]", "{}", '{"a": {}}', "1" * 4000, f'"{"x" * 5000}"', '["a", null]', "1e-400"),
)


def drawn(rng: Rng, values: Any) -> Any:
    values = list(values)
    return values[rng.integers(len(values))]


def files(place: Path, *endings: str) -> list[Path]:
    found = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    return [p for p in found if p.name.endswith(endings or "")]


def cut(place: Path, rng: Rng) -> None:
    path = drawn(rng, [p for p in files(place) if p.stat().st_size and p.name != "receipt.json"])
    os.truncate(path, int(rng.integers(path.stat().st_size)))


def emptied(place: Path, rng: Rng) -> None:
    endings = (*WEIGHTS, "params.json", "config.json", ".index.json", "zarr.json", "config.yaml")
    os.truncate(drawn(rng, files(place, *endings, "model/_METADATA")), 0)


def headers(path: Path) -> list[int]:
    """Returns the bytes of a file that say where its tensors lie, and of what kind they are."""
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


def flip(place: Path, rng: Rng) -> None:
    path = drawn(rng, files(place, *WEIGHTS, ".index.json", "zarr.json", "model/_METADATA"))
    data = bytearray(path.read_bytes())
    for at in rng.choice(headers(path), rng.integers(1, 4)):
        data[at] ^= int(1 << rng.integers(8)) if rng.random() < 0.5 else int(rng.integers(1, 256))
    path.write_bytes(data)


def missing(place: Path, rng: Rng) -> None:
    """Without a file that is needed."""
    needed = [p for p in files(place) if p.name in ("params.json", "config.json", "config.yaml")]
    needed += [p for p in files(place, *WEIGHTS, "zarr.json", "model/_METADATA") if p != place]
    needed += [p for p in files(place) if "c" in p.parent.relative_to(place).parts]
    drawn(rng, needed).unlink()


def value(place: Path, rng: Rng) -> None:
    """With a strange value in its configuration, or in the list of its arrays."""
    names = ("params.json", "config.json", ".index.json", "zarr.json", "model/_METADATA")
    path = drawn(rng, {p.name: p for p in files(place, *names)}.values())
    content = json.loads(path.read_text())
    if path.name in ("params.json", "config.json") and rng.random() < 0.4:
        content |= dict.fromkeys(("rope_theta", "n_kv_heads", "ffn_dim_multiplier", "head_dim"))
        content |= {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "eos_token_id": 2}
    parts = [content]
    while rng.random() < 0.5 and (inner := [v for v in parts[-1].values() if isinstance(v, dict)]):
        parts.append(drawn(rng, [v for v in inner if v] or [content]))
    parts[-1][drawn(rng, parts[-1])] = "here"
    path.write_text(json.dumps(content).replace('"here"', drawn(rng, STRANGE)))


def metadata(place: Path, rng: Rng) -> None:
    """With a strange value in a GGUF file's metadata."""
    kind = "F32" if place.name.startswith("f32") else "Q8_0"
    said = [f"llama.{key}" for key in SHAPE] + (list(SAID) if kind == "Q8_0" else [])
    said += ["general.alignment", "split.count", "llama.attention.key_length"]
    strange = [-1, 0, 10**12, float("nan"), float("inf"), "x", True, [1.5], ["a"], "x" * 5000]
    write_gguf(place, GGUF_TENSORS, kind, **{drawn(rng, said): drawn(rng, strange)})


def sizes(place: Path, rng: Rng) -> None:
    """With another number in the header of a llama2.c file."""
    data = bytearray(place.read_bytes())
    at = (8 if data[:4] == b"24ka" else 0) + 4 * int(rng.integers(6))
    struct.pack_into("<i", data, at, drawn(rng, [-1, 0, 1, 7, 2**31 - 1, -(2**31), 1 << 20]))
    place.write_bytes(data)


def tensors(change: Callable[[dict[str, np.ndarray], Rng], Any]) -> Callable[[Path, Rng], None]:
    """Returns the way to break one that changes the tensors in a file."""

    def broken(place: Path, rng: Rng) -> None:
        path = drawn(rng, files(place, *WEIGHTS))
        found = copy.deepcopy(GGUF_TENSORS) if path.suffix == ".gguf" else read(path)
        change(found, rng)
        path.unlink()
        if path.suffix == ".gguf":
            write_gguf(path, found, "F32" if path.stem == "f32" else "Q8_0")
        else:
            write(path, found)

    broken.__name__ = change.__name__
    return broken


def one(found: Mapping[str, np.ndarray], rng: Rng, ndim: int = 0) -> str:
    """Returns a name, of a matrix that is not square where ndim is 2."""
    fit = [n for n, a in found.items() if ndim != 2 or (a.ndim == 2 and len(set(a.shape)) == 2)]
    return drawn(rng, fit)


@tensors
def dropped(found, rng):
    of_gguf = "token_embd.weight" in found  # such a file without a head is of a tied model
    del found[drawn(rng, [n for n in found if not (of_gguf and n == "output.weight")])]


@tensors
def renamed(found, rng):
    old = one(found, rng)
    strange = ["", "x", "a\nb", "é" * 400, old + ".bias", old.replace("weight", "w"), old.upper()]
    found[drawn(rng, strange)] = found.pop(old)


@tensors
def added(found, rng):
    name = one(found, rng)
    number = str(int(rng.integers(2, 10**9)))
    other = re.sub(r"\d", number, name) if re.search(r"\d", name) else name + number
    found[drawn(rng, [other, other, "a\nb", "x" * 9000])] = found[name]


@tensors
def transposed(found, rng):
    name = one(found, rng, ndim=2)
    found[name] = np.ascontiguousarray(found[name].T)


@tensors
def reshaped(found, rng):
    name = one(found, rng)
    array = found[name]
    shapes = [array[:0], array[:-1], array[None], array.reshape(-1, 2), np.concatenate([array] * 2)]
    found[name] = np.ascontiguousarray(drawn(rng, [a for a in shapes if a.size or len(a) == 0]))


@tensors
def retyped(found, rng):
    name = one(found, rng)
    found[name] = found[name].astype(drawn(rng, [np.int32, np.float64, np.int8, np.int64]))


@tensors
def infinite(found, rng):
    array = found[one(found, rng)].reshape(-1)
    array[rng.integers(array.size)] = drawn(rng, [np.nan, np.inf, -np.inf])


def unlike(place: Path, rng: Rng) -> None:
    """With norms, or types, that differ between shards."""
    path = drawn(rng, files(place, ".pth"))
    found = read(path)
    norm = drawn(rng, [n for n in found if "norm" in n])
    found[norm][rng.integers(32)] += 1
    if rng.random() < 0.3:
        found = {n: a.astype(np.float16) for n, a in found.items()}
    path.unlink()
    write(path, found)


def swapped(place: Path, rng: Rng) -> None:
    a, b = rng.choice(files(place, *WEIGHTS), 2, replace=False)
    a.rename(place / "aside")
    b.rename(a)
    (place / "aside").rename(b)


def foreign(place: Path, rng: Rng) -> None:
    """With a file of a model of other numbers, or of another shape."""
    other = place.parent.parent / "whole" / "other"
    mine = drawn(rng, files(place, *WEIGHTS))
    if mine.suffix == ".pth":
        shutil.copy(other / f"meta{rng.integers(2)}" / mine.name, mine)
    else:
        found = read(other / "hf1/model.safetensors")  # numbers alone would tell nothing
        has = read(mine)
        mine.unlink()
        write(mine, {name: found[name] for name in has})


def beyond(place: Path, rng: Rng) -> None:
    """With more shards than there are, or a gap."""
    path = drawn(rng, files(place, ".pth"))
    i = drawn(rng, [1, 2, 3, 7, 10**9])
    name = f"consolidated.{i:02d}.pth"
    shutil.copy(path, place / (name if not (place / name).exists() else "consolidated.000.pth"))


def index(place: Path, rng: Rng) -> None:
    """With an index that names what is not there, or not that, or no file."""
    (path,) = files(place, ".index.json")
    content = json.loads(path.read_text())
    placed = content["weight_map"]
    names = list(placed)
    name = drawn(rng, names)
    other = next(file for file in placed.values() if file != placed[name])
    wrong = ["gone.bin", "../x", "/etc/passwd", "..", "", "x" * 300, "a\0b", "\ud800", "a\nb"]
    wrong += [7, None]
    strange = [other, *wrong, *wrong, *wrong]
    if rng.random() < 0.2:
        del placed[name]
    elif rng.random() < 0.2:
        placed[f"{name}.more"] = placed[name]
    else:
        placed[name] = drawn(rng, strange)
    path.write_text(json.dumps(content))


class Runs:
    """What runs a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.how = function, arguments

    def __reduce__(self) -> Any:
        return self.how


def runs_code(rng: Rng, canary: Path) -> bytes:
    text, code = str(canary), f"open({str(canary)!r}, 'w').close()"
    ways = [(os.mkdir, text), (exec, code), (eval, code), (os.system, f"touch {text}")]
    ways += [(os.open, text, os.O_CREAT), (Path.touch, canary), (shutil.copy, os.devnull, text)]
    bad = Runs(*drawn(rng, ways))
    around = [bad, {"w": bad}, [bad], {"model": {"w": (bad,)}}, {"a": 1, "b": {"c": bad}}]
    return pickle.dumps(drawn(rng, around), int(rng.integers(6)))


def repickle(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Changes the pickle of a PyTorch file, whose checksums are right again."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def runs(place: Path, rng: Rng) -> None:
    path = drawn(rng, files(place, ".pth", ".bin"))
    repickle(path, lambda _: runs_code(rng, place.parent / "canary"))


def pickled(place: Path, rng: Rng) -> None:
    """With a pickle that is cut, longer, or has other opcodes, under a right checksum."""

    def change(data: bytes) -> bytes:
        at = int(rng.integers(2, len(data)))
        ops = b"cioRbQPq2j0(\x80\x81\x82\x83\x84\x92\x93\x94\x97\x98.lde}]"
        other = bytes([drawn(rng, ops)])
        return drawn(rng, [data[:at], data[:at] + other + data[at:], data[:at] + other + b"."])

    repickle(drawn(rng, files(place, ".pth", ".bin")), change)


def huge(place: Path, rng: Rng) -> None:
    """With a header that claims more than any memory holds."""
    many = int(drawn(rng, [1 << 31, 10**9, 1 << 60, (1 << 63) - 1]))
    path = drawn(rng, files(place, "params.json", "config.json", *WEIGHTS))
    if path.suffix == ".json":
        keys = ("n_layers", "num_hidden_layers", "dim", "hidden_size", "n_heads", "head_dim")
        text = path.read_text()
        key = drawn(rng, [key for key in keys if f'"{key}"' in text])
        path.write_text(re.sub(rf'("{key}": )\d+', rf"\g<1>{many}", text))
    elif path.suffix == ".gguf":
        data = bytearray(path.read_bytes())
        reader = gguf.GGUFReader(path)
        field, tensor = reader.fields["llama.block_count"], drawn(rng, reader.tensors)
        array = b"\t\0\0\0" + drawn(rng, [b"\4\0\0\0", b"\0\0\0\0", b"\t\0\0\0", b"\x08\0\0\0"])
        at = field.offset + sum(part.nbytes for part in field.parts[:2])
        dims = tensor.field.offset + tensor.field.parts[0].nbytes + len(tensor.name) + 4
        claims = [(8, b""), (16, b""), (24, b""), (dims, b""), (at, array), (at, array)]
        start, before = drawn(rng, claims)
        data[start : start + len(before) + 8] = before + many.to_bytes(8, "little")
        path.write_bytes(data)
    elif path.suffix == ".safetensors":
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header[one({n: np.zeros(2) for n in header if "." in n}, rng)]["shape"] = [many, many]
        raw = json.dumps(header).encode()
        tail = data[8 + int.from_bytes(data[:8], "little") :]
        length = drawn(rng, [len(raw), len(raw), many])
        path.write_bytes(length.to_bytes(8, "little") + raw + tail)
    else:
        number = pickle.dumps(many, 2)[2:-1]
        repickle(path, lambda data: data.replace(b"K ", number, int(rng.integers(1, 9))))


def stacked(place: Path, rng: Rng) -> None:
    """With an array of other, or of very many, layers."""
    path = drawn(rng, [p for p in files(place, "zarr.json") if ".w" in p.parent.name])
    content = json.loads(path.read_text())
    shape = content["shape"]
    shapes = [[], [10**12, *shape[1:]], [1, *shape[1:]], [*shape, 1], [0, *shape[1:]], [2**62] * 4]
    path.write_text(json.dumps(content | {"shape": drawn(rng, shapes)}))
