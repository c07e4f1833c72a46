"""Functions that corrupt a checkpoint's weights, or replace a file by one that is not regular."""

import os
import struct
import zipfile
from pathlib import Path

import gguf
from corrupt_checkpoint import WEIGHTS, Rng, choose, files


def storage_offsets(path: Path) -> list[int]:
    """Returns the offsets of the bytes of a PyTorch file's tensors."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        infos = [info for info in archive.infolist() if "/data/" in info.filename]
    starts = [i.header_offset + 30 for i in infos]
    starts = [start + sum(struct.unpack_from("<HH", data, start - 4)) for start in starts]
    return [start + n for start, i in zip(starts, infos, strict=True) for n in range(i.file_size)]


def flip_weight_bit(checkpoint: Path, rng: Rng) -> None:
    """Flips one bit of the weights."""
    path = choose(rng, files(checkpoint, ".pth", ".bin"))
    data = bytearray(path.read_bytes())
    data[choose(rng, storage_offsets(path))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def shift_weights(checkpoint: Path, rng: Rng) -> None:
    """Removes or inserts bytes somewhere in the weights of a GGUF file."""
    data = checkpoint.read_bytes()
    at = int(rng.integers(gguf.GGUFReader(checkpoint).data_offset, len(data)))
    n = int(choose(rng, [1, 4, 16, 31, 32, 4096]))
    more = bytes(n) if rng.random() < 0.5 else rng.bytes(n)
    checkpoint.write_bytes(choose(rng, [data[:at] + data[at + n :], data[:at] + more + data[at:]]))


def replace_by_special_file(checkpoint: Path, rng: Rng) -> None:
    """Replaces a file by a pipe, a link to a device, a folder, or a sparse file of 256 GiB."""
    endings = (*WEIGHTS, "params.json", ".index.json", "zarr.json", "model/_METADATA")
    chunks = [
        p
        for p in files(checkpoint)
        if checkpoint.is_dir() and "c" in p.relative_to(checkpoint).parts
    ]
    path = choose(rng, [*files(checkpoint, *endings), *chunks])
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
