"""Converts a Meta checkpoint of LLaMA 7B's shape; compares the rate with that of a plain copy.

    python benchmarks/convert.py FOLDER [--layers 32] [--to orbax hf meta] [--rounds 3]

FOLDER needs space for three times the checkpoint (13.5 GB at 32 layers, in float16). The checkpoint
contains random numbers. In each round it is copied, with fsync after each file, and then converted
to each format by the command that a user types, with the proof and with --verify-later. Before each
of these its pages are dropped from the page cache. The ratios are medians over the rounds.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
    """Prints the seconds of each round, then medians and ratios."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--to", nargs="+", default=["orbax", "hf", "meta"], help="formats (all)")
    parser.add_argument("--rounds", type=int, default=3)
    add_json_option(parser)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    source, target = args.folder / "meta", args.folder / "target"
    total = write_checkpoint(source, args.layers)
    print(f"{total / 1e9:.2f} GB in {args.layers} layers")

    def convert(to: str, *options: str) -> str:
        command = [sys.executable, "-m", "llama_jax", "convert", source, target, "--to", to]
        command = [*map(str, command), *options]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout.splitlines()[0].split("proof), ")[1]

    actions: dict[str, Callable[[], str | None]] = {"copy": lambda: copy(source, target)}
    for to in args.to:
        actions[to] = partial(convert, to)
        actions[f"{to}, proof later"] = partial(convert, to, "--verify-later")
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(args.rounds):
        for name, act in actions.items():
            os.sync()  # so that the disk doesn't write the previous action's files meanwhile
            drop_from_page_cache(list(source.iterdir()))
            start = time.perf_counter()
            details = act()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name:18} {seconds[name][-1]:7.1f} s  {details or ''}", flush=True)
            shutil.rmtree(target)
    shutil.rmtree(source)

    for name in actions:
        rates = [total / 1e6 / s for s in seconds[name]]
        ratios = [copied / s for copied, s in zip(seconds["copy"], seconds[name], strict=True)]
        rate, ratio = statistics.median(rates), statistics.median(ratios)
        print(
            f"{name:18} {rate:7.0f} MB/s  {ratio:.2f} of the copy ({min(ratios):.2f} to"
            f" {max(ratios):.2f})"
        )
        if name == "copy":
            continue
        to, *later = name.split(",")
        verb = "converting" if later else "converting and verifying"
        result = Result(
            name=f"{verb} Meta's files to {to}, {args.layers} layers of 7B", unit="MB/s", ours=rate,
            peer="a plain copy with fsync", theirs=total / 1e6 / statistics.median(seconds["copy"]),
            ratio=ratio,
        )  # fmt: skip
        append_result(args.json, result)


if __name__ == "__main__":
    main()
