"""Converts a Meta checkpoint of LLaMA 7B's shape, beside a plain copy of the same bytes.

    python benchmarks/convert.py FOLDER [--layers 32] [--to orbax hf meta]

FOLDER needs room for three times the checkpoint (13.5 GB at 32 layers, in float16). The checkpoint
is made of random numbers, copied with its bytes waited for (fsync), then converted by the command
that a user types, to each format. Before each the pages of the checkpoint are dropped from memory.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from result import Result, add_argument, keep

from llama_jax.config.family import FAMILY
from llama_jax.convert.formats.meta import MetaWriter, writer_layout
from llama_jax.convert.layout import weights


def make(folder: Path, layers: int) -> int:
    """Writes the checkpoint and returns its bytes."""
    config = replace(FAMILY["llama-7b"], n_layers=layers)
    layout = writer_layout(config, 1)
    folder.mkdir()
    # Random bits of a plausible size; drawing fresh ones for each weight would take minutes.
    numbers = (np.random.default_rng(0).standard_normal(1 << 28, np.float32) / 64).astype("f2")
    total = 0
    with MetaWriter(
        folder, config, layout, dict.fromkeys(weights(config), np.dtype("f2"))
    ) as writer:
        for i, weight in enumerate(weights(config)):
            pieces = []
            for shard, name, shape in layout.tensor_specs(config, weight):
                size = int(np.prod(shape))
                pieces.append((shard, name, numbers[i : i + size].reshape(shape)))
                total += 2 * size
            writer.write(pieces)
    return total


def copy(source: Path, target: Path) -> None:
    """Copies a folder and waits for the disk."""
    target.mkdir()
    for path in source.iterdir():
        with open(path, "rb") as read, open(target / path.name, "wb") as written:
            shutil.copyfileobj(read, written, 1 << 24)
            os.fsync(written.fileno())


def forget(folder: Path) -> None:
    """Drops the folder's pages from memory."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Prints a table of seconds, rates and peak memory."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--to", nargs="+", default=["orbax", "hf", "meta"], help="formats (all)")
    add_argument(parser)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    source, target = args.folder / "meta", args.folder / "target"
    total = make(source, args.layers)
    print(f"{total / 1e9:.2f} GB in {args.layers} layers")

    def timed(name: str, act: Callable[[], str]) -> float:
        forget(source)
        begun = time.perf_counter()
        said = act()
        seconds = time.perf_counter() - begun
        print(f"{name:12} {seconds:7.1f} s  {total / 1e6 / seconds:7.0f} MB/s  {said}", flush=True)
        shutil.rmtree(target)
        return seconds

    def convert(to: str) -> str:
        command = [sys.executable, "-m", "llama_jax", "convert", source, target, "--to", to]
        done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
        verified = json.loads((target / "receipt.json").read_text())["verified"]
        return done.stdout.split("proof), ")[1].splitlines()[0] + f", {verified}"

    def plain() -> str:
        copy(source, target)
        return ""

    copied = timed("copy", plain)
    for to in args.to:
        took = timed(to, lambda to=to: convert(to))
        print(f"{'':12} {took / copied:.1f} times the copy")
        rates = total / 1e6 / took, "a plain copy that waits for the disk", total / 1e6 / copied
        what = f"converting Meta's files to {to} and proving it, {args.layers} layers of 7B"
        keep(args.json, Result(what, "MB/s", *rates, copied / took))
    timed("copy again", plain)
    shutil.rmtree(source)


if __name__ == "__main__":
    main()
