"""Measures how long it takes to save and restore 1 GB of state, with and without fingerprints.

    python benchmarks/checkpoint.py FOLDER [--rounds 3]

FOLDER is on the disk or in the bucket to measure. The checksums of the chunks (CRC-32C) are always
computed. Both ways alternate. A restored checkpoint was written just before, so a local disk reads
it from the page cache: the figures then measure the program, not the disk.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import jax

from llama_jax.checkpoint import fingerprint
from llama_jax.checkpoint.training_checkpoints import Progress, TrainingCheckpoints
from llama_jax.checkpoint.tree import eval_shape_on_mesh
from llama_jax.config.model import ModelConfig
from llama_jax.config.run import (
    CheckpointConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    TrainingConfig,
)
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.runtime.storage import parse_path, remove_tree
from llama_jax.training.step import init_state

CONFIG = Config(
    model=ModelConfig(
        dim=1024, n_layers=5, n_heads=8, n_kv_heads=8, head_dim=128, hidden_dim=2816,
        vocab_size=8192, context=1024,
    ),
    data=DataConfig(mixture={"none": 1.0}, batch_size=1, seq_len=1024),
    optimizer=OptimizerConfig(),
    training=TrainingConfig(out="none", steps=1),
)  # fmt: skip


@contextmanager
def without_fingerprints() -> Iterator[None]:
    """Saves and restores without fingerprints during the block."""

    def nothing(tree: Any) -> dict[str, str]:
        return {}

    with (
        mock.patch.object(fingerprint, "start_fingerprints", nothing),
        mock.patch.object(fingerprint, "fingerprints", nothing),
    ):
        yield


def measure(folder: Any, state: Any, abstract: Any) -> tuple[float, float, float]:
    """Returns the seconds: of `save` until it returns, and until all is stored; of a restore."""
    remove_tree(folder)
    checkpoints = TrainingCheckpoints(folder, CheckpointConfig())
    start = time.monotonic()
    checkpoints.save(Progress(1, []), *state)
    blocked = time.monotonic() - start
    checkpoints.wait()
    saved = time.monotonic() - start
    start = time.monotonic()
    jax.block_until_ready(checkpoints.restore(1, *abstract)[1:])
    restored = time.monotonic() - start
    checkpoints.close()
    remove_tree(folder)
    return blocked, saved, restored


def main() -> int:
    """Prints the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    folder = parse_path(args.folder) / "checkpoint-benchmark"
    with jax.set_mesh(one_device_mesh()):
        init = partial(init_state, CONFIG)
        state = jax.block_until_ready(jax.jit(init)(jax.random.key(0)))
        abstract = eval_shape_on_mesh(init, jax.random.key(0))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        print(f"{size / 1e9:.2f} GB of state", flush=True)
        measure(folder, state, abstract)  # compiles
        seconds: dict[str, list[tuple[float, float, float]]] = {"with": [], "without": []}
        for _ in range(args.rounds):
            seconds["with"].append(measure(folder, state, abstract))
            with without_fingerprints():
                seconds["without"].append(measure(folder, state, abstract))
    for name, rounds in seconds.items():
        blocked, saved, restored = map(statistics.median, zip(*rounds, strict=True))
        print(
            f"{name} fingerprints: save {saved:.2f} s, of which the loop is blocked for"
            f" {blocked:.2f} s; restore {restored:.2f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
