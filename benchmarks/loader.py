"""Measures whether training waits for data: in the quickstart, and on a host of a large run.

    python benchmarks/loader.py [--steps 10] [--step-seconds 1.94] [--skip-quickstart]

First the quickstart trains 40 steps: `data_wait` in metrics.jsonl is the share of its step time in
which the device waited. Then one process reads what one of 64 hosts needs of a batch of 2,048
windows of 2,048 tokens: 32 rows in each step, from a local folder and from an S3 store (moto)
that answers after 50 ms. It reads step after step without a pause, and then with a pause as long as
a step, as training does. LLaMA 7B takes about 1.94 s a step on the 256 TPU v5p of 64 hosts
(`plan` estimates 7.8 s on 64 for configs/llama-7b.yaml). The local folder is in the page cache.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import numpy as np
from object_store import (  # pyright: ignore[reportMissingImports] (of the tests)
    store_of_this_process,
)

from llama_jax.config.data import DataConfig
from llama_jax.data import shards
from llama_jax.data.epoch_order import find_windows
from llama_jax.data.samples import Samples
from llama_jax.data.shard_writer import EncodedSpan, SplitWriter
from llama_jax.data.tokenize import tokenize_corpus
from llama_jax.runtime.storage import AnyPath, parse_path
from llama_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
BATCH, HOSTS, LENGTH, VOCAB = 2048, 64, 2048, 32_000
ROWS = range(BATCH // HOSTS)
TOKENS = 1 << 21  # in 64 chunks
LATENCY = 0.05  # seconds


def measure_order() -> None:
    """Prints the time of the permutation of an epoch of a trillion tokens."""
    for count in (1, 16, 32, BATCH):
        numbers, rounds = np.arange(count) + 10**9, 200
        start = time.perf_counter()
        for _ in range(rounds):
            find_windows(numbers, 10**12 // LENGTH, seed=0)
        seconds = (time.perf_counter() - start) / rounds
        print(f"order of {count:,} samples: {1e6 * seconds / count:.2f} µs each")


def measure_quickstart(folder: Path) -> None:
    """Prints the share of the quickstart's step time in which the device waits."""
    command = [sys.executable, "-m", "llama_jax", "train", ROOT / "configs/quickstart.yaml"]
    command += ["training.steps=40", "training.eval_every=0", "logging.samples=[]"]
    subprocess.run(
        command, check=True, cwd=folder, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    steps = [r for r in read_metrics(folder / "runs/quickstart/metrics.jsonl") if "loss" in r]
    waited = sum(r["data_wait"] * r["step_seconds"] for r in steps)
    seconds = sum(r["step_seconds"] for r in steps)
    print(f"quickstart: {waited / seconds:.4%} of {seconds:.1f} s wait for data (goal: < 0.1%)")


def write_tokens(folder: AnyPath) -> None:
    """Writes token shards of random tokens, with a small tokenizer, which decodes nothing."""
    tokenizer = folder / "tokenizer.model"
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "tokens"
        tokenize_corpus([str(ROOT / "benchmarks/*.py")], out, n_vocab=500, progress=False)
        tokenizer.write_bytes((out / "tokenizer.model").read_bytes())
    writers = {split: SplitWriter(folder / split, VOCAB) for split in ("train", "validation")}
    ids = np.random.default_rng(0).integers(3, VOCAB, TOKENS, np.int32)
    for split, n in (("train", TOKENS), ("validation", LENGTH)):
        writers[split].append(EncodedSpan(ids[:n], n, split, True, True))
    shards.write_meta(folder, sources=["x"], tokenizer=tokenizer, n_vocab=VOCAB, writers=writers)


def read_step(samples: Samples, step: int) -> float:
    """Reads the rows of this host; returns the time [s]."""
    start = time.perf_counter()
    reads = samples.read_step(step, ROWS)
    rows = [reads[row].result() for row in ROWS]
    arrays = [np.array(field) for field in zip(*rows, strict=True)]
    assert arrays[0].shape == (len(ROWS), LENGTH)
    return time.perf_counter() - start


def measure_host(name: str, folder: AnyPath, steps: int, step_seconds: float) -> None:
    """Prints how long a host's rows of a step take, and how long a step waits for them."""
    config = DataConfig(mixture={str(folder): 1.0}, batch_size=BATCH, seq_len=LENGTH)
    samples = Samples(config)
    start = time.perf_counter()
    for step in range(4 * steps):
        read_step(samples, step)
    seconds = (time.perf_counter() - start) / (4 * steps)
    waits = list[float]()
    samples = Samples(config)
    for step in range(steps):
        waits.append(read_step(samples, step))
        time.sleep(step_seconds)
    share = np.mean(waits[1:]) / step_seconds  # the first step waits for the first read
    print(
        f"{name}: {len(ROWS) * LENGTH / seconds:,.0f} tokens/s, {seconds:.4f} s a step,"
        f" {seconds / step_seconds:.2%} of {step_seconds} s (goal: < 10%); reading ahead, a step"
        f" waits {1e3 * np.mean(waits[1:]):.1f} ms ({share:.2%}), the first {waits[0]:.2f} s"
    )


@contextlib.contextmanager
def distant_bucket() -> Iterator[AnyPath]:
    """A folder of token shards in a bucket that answers after `LATENCY`."""
    with store_of_this_process("s3") as store:
        folder = parse_path(store.url("tokens"))
        write_tokens(folder)
        store.faults.latency = LATENCY
        yield folder


def main() -> None:
    """Prints all measurements."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--steps", type=int, default=10, help="steps with a pause (10)")
    parser.add_argument("--step-seconds", type=float, default=1.94, help="of a step (1.94)")
    parser.add_argument("--skip-quickstart", action="store_true")
    args = parser.parse_args()
    measure_order()
    with tempfile.TemporaryDirectory() as temporary:
        if not args.skip_quickstart:
            measure_quickstart(Path(temporary))
        local = parse_path(temporary) / "tokens"
        local.mkdir()
        write_tokens(local)
        measure_host("local folder", local, args.steps, args.step_seconds)
    with distant_bucket() as bucket:
        measure_host("bucket, 50 ms", bucket, args.steps, args.step_seconds)


if __name__ == "__main__":
    main()
