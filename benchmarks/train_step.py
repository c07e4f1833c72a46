"""Tokens per second of one training step (forward, backward, AdamW) compared with transformers.

    pip install torch transformers        # the peer; without them only llama_jax is timed
    python benchmarks/train_step.py [--rounds 9] [--dtype float32] [--alone]

Shape: dim 512, 8 layers, 8 heads, FFN 1376, vocabulary 32,000, batch 4×512. Each side has its own
process, as a user would start it, and the sides step alternately: a drift of the machine's speed
affects both, and an idle side's threads don't compete with the other. With --alone the processes
run one after the other, twice each, so that nothing of the other side is in memory.
"""

import argparse
import importlib.util
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from alternate import time_alternately
from result import Result, add_json_option, append_result

from llama_jax.runtime.cpu import cpu_cores

os.environ["JAX_PLATFORMS"] = "cpu"  # even where an accelerator, or its compiler, is installed

if TYPE_CHECKING:
    from llama_jax.config.model import ModelConfig

BATCH, LENGTH, VOCAB = 4, 512, 32_000
Dtype = Literal["float32", "bfloat16"]


def llama_jax(dtype: Dtype, tokens: np.ndarray) -> Callable[[], float]:
    """Returns a function that runs one step of llama_jax and returns the loss."""
    from llama_jax.config.model import ModelConfig

    model = ModelConfig(
        dim=512, n_layers=8, n_heads=8, n_kv_heads=8, head_dim=64, hidden_dim=1376,
        vocab_size=VOCAB, dtype=dtype, remat="none", scan=False,
    )  # fmt: skip
    step = build_step(model, tokens)
    return lambda: float(step())


def build_step(
    model: "ModelConfig", tokens: np.ndarray, segments: bool = True
) -> Callable[[], Any]:
    """Returns a function that dispatches one step on `tokens` [B, T + 1] and returns its loss.

    Without `segments` rows are single texts, as in other projects' benchmarks.
    """
    import jax
    import jax.numpy as jnp

    from llama_jax.config.run import Config, DataConfig, OptimizerConfig, TrainingConfig
    from llama_jax.data.windows import Batch
    from llama_jax.parallel.mesh import one_device_mesh, shard_array
    from llama_jax.runtime.process_memory import retain_freed_memory
    from llama_jax.training.step import init_state, train_step

    retain_freed_memory()  # as `llama-jax train` does
    B, T = tokens[:, 1:].shape
    config = Config(
        model=model,
        data=DataConfig(mixture={"random": 1.0}, batch_size=B, seq_len=T),
        optimizer=OptimizerConfig(warmup_steps=1),
        training=TrainingConfig(out="none", steps=1000),
    )

    def shard(rows_BT: np.ndarray) -> jax.Array:
        return shard_array(rows_BT[None].astype(np.int32), "ABT")

    ones_BT = np.ones_like(tokens[:, 1:])
    with jax.set_mesh(one_device_mesh()):
        batch = Batch(
            tokens=shard(tokens[:, :-1]),
            targets=shard(tokens[:, 1:]),
            positions=shard(ones_BT * np.arange(T)),
            segments=shard(ones_BT) if segments else None,
        )
        state = jax.jit(init_state, static_argnums=0)(config, jax.random.key(0))

    def step() -> jax.Array:
        nonlocal state
        with jax.set_mesh(one_device_mesh()):
            *state, metrics = train_step(config, *state, batch, jnp.int32(0))
        return metrics.loss

    return step


def transformers(dtype: Dtype, tokens: np.ndarray) -> Callable[[], float]:
    """Returns a function that runs one step of transformers with eager PyTorch."""
    import torch  # pyright: ignore[reportMissingImports] (the peer is not a dependency)
    from transformers import (  # pyright: ignore[reportMissingImports]
        LlamaConfig,
        LlamaForCausalLM,
    )

    torch.set_num_threads(cpu_cores())
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    inputs = torch.from_numpy(tokens)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(input_ids=inputs[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), inputs[:, 1:].flatten()
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    return step


SIDES = {"llama_jax": llama_jax, "transformers": transformers}


def set_up_side(name: str, dtype: Dtype) -> Callable[[], None]:
    """Returns a function that runs one step of a side. Runs in the side's process."""
    step = SIDES[name](dtype, np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1)))

    def run_round() -> None:
        step()

    return run_round


def main() -> None:
    """Prints a table of medians and the ratio."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each (9)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--alone", action="store_true", help="one process at a time")
    add_json_option(parser)
    args = parser.parse_args()
    names = ["llama_jax"]
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        names.append("transformers")
    sides = {name: partial(set_up_side, name, args.dtype) for name in names}
    if args.alone:
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for name in (*names, *names):
            seconds[name] += time_alternately({name: sides[name]}, args.rounds)[name]
    else:
        seconds = time_alternately(sides, args.rounds)
    for name, times in seconds.items():
        low, middle, high = (BATCH * LENGTH / f(times) for f in (max, statistics.median, min))
        print(f"{name:13} {middle:6.1f} tokens/s  (min {low:.1f}, max {high:.1f})")
    if len(names) == 2:
        ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
        ratio = statistics.median(ratios)
        print(f"llama_jax / transformers, median of pairs: {ratio:.2f}")
        ours, theirs = (BATCH * LENGTH / statistics.median(times) for times in seconds.values())
        result = Result(
            name=f"a training step, {args.dtype}", unit="tokens/s", ours=ours,
            peer="transformers, eager", theirs=theirs, ratio=ratio,
        )  # fmt: skip
        append_result(args.json, result)


if __name__ == "__main__":
    main()
