"""Converts a Meta checkpoint of LLaMA 7B's shape; compares the rate with that of a plain copy.

    python benchmarks/convert.py FOLDER [--layers 32] [--to orbax hf meta]

FOLDER needs space for three times the checkpoint (13.5 GB at 32 layers, in float16). The checkpoint
contains random numbers. It is copied, with fsync after each file, and then converted to each format
by the command that a user types. Before each of these its pages are dropped from the page cache.
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
from load_weights import drop_from_page_cache
from result import Result, add_json_option, append_result

from llama_jax.config.family import FAMILY
from llama_jax.convert.formats.meta import MetaWriter, writer_layout
from llama_jax.convert.layout import weights


def write_checkpoint(folder: Path, layers: int) -> int:
    """Writes a checkpoint of random numbers and returns its size in bytes."""
    config = replace(FAMILY["llama-7b"], n_layers=layers)
    layout = writer_layout(config, 1)
    folder.mkdir()
    # All weights take slices of one array: drawing new numbers for each would take minutes.
    numbers = (np.random.default_rng(0).standard_normal(1 << 28, np.float32) / 64).astype("f2")
    total = 0
    with MetaWriter(
        folder, config, layout, dict.fromkeys(weights(config), np.dtype("f2"))
    ) as writer:
        for i, weight in enumerate(weights(config)):
            tensors = []
            for shard, name, shape in layout.tensor_specs(config, weight):
                size = int(np.prod(shape))
                tensors.append((shard, name, numbers[i : i + size].reshape(shape)))
                total += 2 * size
            writer.write(tensors)
    return total


def copy(source: Path, target: Path) -> None:
    """Copies a folder; calls fsync on each file."""
    target.mkdir()
    for path in source.iterdir():
        with open(path, "rb") as source_file, open(target / path.name, "wb") as copied_file:
            shutil.copyfileobj(source_file, copied_file, 1 << 24)
            os.fsync(copied_file.fileno())


def main() -> None:
    """Prints a table of seconds, rates and peak memory."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--to", nargs="+", default=["orbax", "hf", "meta"], help="formats (all)")
    add_json_option(parser)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    source, target = args.folder / "meta", args.folder / "target"
    total = write_checkpoint(source, args.layers)
    print(f"{total / 1e9:.2f} GB in {args.layers} layers")

    def time_action(name: str, act: Callable[[], str]) -> float:
        drop_from_page_cache(list(source.iterdir()))
        start = time.perf_counter()
        details = act()
        seconds = time.perf_counter() - start
        rate = total / 1e6 / seconds
        print(f"{name:12} {seconds:7.1f} s  {rate:7.0f} MB/s  {details}", flush=True)
        shutil.rmtree(target)
        return seconds

    def convert(to: str) -> str:
        command = [sys.executable, "-m", "llama_jax", "convert", source, target, "--to", to]
        done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
        verified = json.loads((target / "receipt.json").read_text())["verified"]
        return done.stdout.split("proof), ")[1].splitlines()[0] + f", {verified}"

    def copy_plainly() -> str:
        copy(source, target)
        return ""

    copy_seconds = time_action("copy", copy_plainly)
    for to in args.to:
        seconds = time_action(to, lambda to=to: convert(to))
        print(f"{'':12} {seconds / copy_seconds:.1f} times the copy")
        name = f"converting Meta's files to {to} and verifying them, {args.layers} layers of 7B"
        result = Result(
            name=name, unit="MB/s", ours=total / 1e6 / seconds,
            peer="a plain copy with fsync", theirs=total / 1e6 / copy_seconds,
            ratio=copy_seconds / seconds,
        )  # fmt: skip
        append_result(args.json, result)
    time_action("copy again", copy_plainly)
    shutil.rmtree(source)


if __name__ == "__main__":
    main()
