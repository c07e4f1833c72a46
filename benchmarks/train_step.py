"""Tokens per second of one training step (forward, backward, AdamW) beside transformers.

    pip install torch transformers        # the peer; without them only llama_jax is timed
    python benchmarks/train_step.py [--rounds 5] [--dtype float32]

Shape: dim 512, 8 layers, 8 heads, FFN 1376, vocabulary 32,000, batch 4×512. Both run on the same
cores in the same process, in turn, so that a drift of the machine's speed meets both.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import Config, DataConfig, OptimizerConfig, TrainingConfig
from llama_jax.data.batches import Batch
from llama_jax.family import ModelConfig
from llama_jax.sharding import one_device_mesh, place
from llama_jax.training.step import init_state, train_step

BATCH, LENGTH = 4, 512


def ours(dtype: str, tokens: np.ndarray) -> Callable[[], float]:
    """Returns a function that runs one step of llama_jax and returns the loss."""
    config = Config(
        model=ModelConfig(
            dim=512, n_layers=8, n_heads=8, n_kv_heads=8, head_dim=64, hidden_dim=1376,
            vocab_size=32_000, dtype=dtype, remat="none",
        ),
        data=DataConfig(mixture={"random": 1.0}, batch_size=BATCH, seq_len=LENGTH),
        optimizer=OptimizerConfig(warmup_steps=1),
        training=TrainingConfig(out="none", steps=1000),
    )  # fmt: skip
    fields = (tokens[:, :-1], tokens[:, 1:], np.arange(LENGTH) + 0 * tokens[:, 1:])
    fields = (*fields, np.ones_like(tokens[:, 1:]))
    with jax.set_mesh(one_device_mesh()):
        batch = Batch(*(place(x[None].astype(np.int32), "ABT") for x in fields))
        state = jax.jit(init_state, static_argnums=0)(config, jax.random.key(0))

        def step() -> float:
            nonlocal state
            with jax.set_mesh(one_device_mesh()):
                *state, metrics = train_step(config, *state, batch, jnp.int32(0))
                return float(metrics.loss)

        return step


def transformers_eager(dtype: str, tokens: np.ndarray) -> Callable[[], float]:
    """Returns a function that runs one step of transformers with eager PyTorch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    inputs = torch.from_numpy(tokens.astype(np.int64))

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


def main() -> None:
    """Prints a table of medians and the ratio, pair by pair."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each (default 5)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    tokens = np.random.default_rng(0).integers(0, 32_000, (BATCH, LENGTH + 1))
    steps = {"llama_jax": ours(args.dtype, tokens)}
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        steps["transformers"] = transformers_eager(args.dtype, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():  # compile and warm up
        step(), step()
    for _ in range(args.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        rates = [BATCH * LENGTH / s for s in times]
        print(
            f"{name:14} {statistics.median(rates):7.1f} tokens/s  (min {min(rates):.1f}, max {max(rates):.1f})"
        )
    if len(seconds) == 2:
        ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
        print(f"llama_jax / transformers, median of pairs: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
