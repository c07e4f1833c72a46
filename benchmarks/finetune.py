"""Tokens per second of a step of fine-tuning, compared with transformers and PEFT.

    pip install -e '.[peers]'
    python benchmarks/finetune.py [--rounds 9] [--only lora] [--dtype float32]

The shape is that of SmolLM2-135M, with random weights; the batch is 4×512. `lora` trains pairs of
rank 16 beside the seven matrices of each layer, `full` all weights. Each side has its own process,
and the sides step alternately (see `train_step.py`). Our windows isolate their examples; the peer's
are single texts, which is less work.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
from alternate import time_alternately
from result import Result, add_json_option, append_result

from llama_jax.runtime.cpu import cpu_cores

os.environ["JAX_PLATFORMS"] = "cpu"  # even where an accelerator, or its compiler, is installed

BATCH, LENGTH, VOCAB, RANK, ALPHA, RATE = 4, 512, 49_152, 16, 32.0, 2e-4
Dtype = Literal["float32", "bfloat16"]
Kind = Literal["lora", "full"]


def llama_jax(kind: Kind, dtype: Dtype, tokens: np.ndarray) -> Callable[[], float]:
    """Returns a function that runs one step of llama_jax and returns the loss."""
    import jax
    import jax.numpy as jnp

    from llama_jax.config.lora import LoraConfig
    from llama_jax.config.model import ModelConfig
    from llama_jax.config.run import Config, DataConfig, OptimizerConfig, TrainingConfig
    from llama_jax.data.windows import Batch
    from llama_jax.model.weights import Llama
    from llama_jax.parallel.mesh import one_device_mesh, shard_array
    from llama_jax.runtime.process_memory import retain_freed_memory
    from llama_jax.training.optimizer import adamw
    from llama_jax.training.step import train_step
    from llama_jax.training.trainable import init_trained

    retain_freed_memory()  # as `llama-jax train` does
    config = Config(
        model=ModelConfig(
            dim=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, hidden_dim=1536,
            vocab_size=VOCAB, tied_head=True, dtype=dtype, remat="none", scan=False,
        ),
        data=DataConfig(mixture={"random": 1.0}, batch_size=BATCH, seq_len=LENGTH),
        optimizer=OptimizerConfig(warmup_steps=1, peak_lr=RATE, weight_decay=0.0),
        lora=LoraConfig(rank=RANK, alpha=ALPHA) if kind == "lora" else None,
        training=TrainingConfig(out="none", init_from="random", steps=1000),
    )  # fmt: skip
    with jax.set_mesh(one_device_mesh()):
        ones_BT = np.ones((BATCH, LENGTH), np.int32)
        rows = (tokens[:, :-1], tokens[:, 1:], ones_BT * np.arange(LENGTH), ones_BT)
        batch = Batch(*(shard_array(row[None].astype(np.int32), "ABT") for row in rows))
        key = jax.random.key(0)
        trained = jax.jit(partial(init_trained, config))(key)
        base = jax.jit(partial(Llama, config.model))(key) if kind == "lora" else None
        opt_state = jax.jit(adamw(config.optimizer).init)(trained)

    def step() -> float:
        nonlocal trained, opt_state
        with jax.set_mesh(one_device_mesh()):
            trained, opt_state, metrics = train_step(
                config, trained, opt_state, batch, jnp.int32(0), base
            )
        return float(metrics.loss)

    return step


def peft(kind: Kind, dtype: Dtype, tokens: np.ndarray) -> Callable[[], float]:
    """Returns a function that runs one step of transformers, with PEFT for `lora`."""
    import torch  # pyright: ignore[reportMissingImports] (the peers are not dependencies)
    from transformers import (  # pyright: ignore[reportMissingImports]
        LlamaConfig,
        LlamaForCausalLM,
    )

    torch.set_num_threads(cpu_cores())
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, use_cache=False,
        )
    )  # fmt: skip
    if kind == "lora":
        from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]

        matrices = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=matrices)
        )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    adamw = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    inputs = torch.from_numpy(tokens)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(input_ids=inputs[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), inputs[:, 1:].flatten()
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    return step


SIDES = {"llama_jax": llama_jax, "peft": peft}


def set_up_side(name: str, kind: Kind, dtype: Dtype) -> Callable[[], None]:
    """Returns a function that runs one step of a side. Runs in the side's process."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1))
    step = SIDES[name](kind, dtype, tokens)

    def run_round() -> None:
        step()

    return run_round


def main() -> None:
    """Prints the medians and the ratio of each kind of fine-tuning."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each (9)")
    parser.add_argument("--only", choices=["lora", "full"], help="default: both")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    add_json_option(parser)
    args = parser.parse_args()
    kinds: tuple[Kind, ...] = (args.only,) if args.only else ("lora", "full")
    for kind in kinds:
        sides = {name: partial(set_up_side, name, kind, args.dtype) for name in SIDES}
        ours, theirs = time_alternately(sides, args.rounds).values()
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        rates = [BATCH * LENGTH / statistics.median(times) for times in (ours, theirs)]
        print(f"{kind}: llama_jax {rates[0]:.1f}, peer {rates[1]:.1f} tokens/s; pairs {ratio:.2f}")
        peer = "transformers and PEFT" if kind == "lora" else "transformers, eager"
        result = Result(
            name=f"a step of fine-tuning ({kind}), {args.dtype}", unit="tokens/s", ours=rates[0],
            peer=peer, theirs=rates[1], ratio=ratio,
        )  # fmt: skip
        append_result(args.json, result)


if __name__ == "__main__":
    main()
