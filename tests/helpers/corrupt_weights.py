"""Ways to break a checkpoint that no header shows: in its weights, or by what is no file."""

import os
import struct
import zipfile
from pathlib import Path

import gguf
from corrupt_checkpoint import WEIGHTS, Rng, drawn, files


def storages(path: Path) -> list[int]:
    """Returns the bytes of a PyTorch file that belong to its tensors."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        infos = [info for info in archive.infolist() if "/data/" in info.filename]
    begins = [i.header_offset + 30 for i in infos]
    begins = [b + sum(struct.unpack_from("<HH", data, b - 4)) for b in begins]
    return [b + n for b, i in zip(begins, infos, strict=True) for n in range(i.file_size)]


def one_bit(place: Path, rng: Rng) -> None:
    """With one bit of its weights flipped."""
    path = drawn(rng, files(place, ".pth", ".bin"))
    data = bytearray(path.read_bytes())
    data[drawn(rng, storages(path))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def shifted(place: Path, rng: Rng) -> None:
    """With bytes missing, or more of them, somewhere in its weights."""
    data = place.read_bytes()
    at = int(rng.integers(gguf.GGUFReader(place).data_offset, len(data)))
    n = int(drawn(rng, [1, 4, 16, 31, 32, 4096]))
    more = bytes(n) if rng.random() < 0.5 else rng.bytes(n)
    place.write_bytes(drawn(rng, [data[:at] + data[at + n :], data[:at] + more + data[at:]]))


def irregular(place: Path, rng: Rng) -> None:
    """With a pipe, a link to a device, a folder or a hole of 256 GiB as one of its files."""
    endings = (*WEIGHTS, "params.json", ".index.json", "zarr.json", "model/_METADATA")
    chunks = [p for p in files(place) if place.is_dir() and "c" in p.relative_to(place).parts]
    path = drawn(rng, [*files(place, *endings), *chunks])
    if (kind := rng.integers(4)) == 0:
        os.truncate(path, 256 << 30)
        return
    path.unlink()
    if kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
