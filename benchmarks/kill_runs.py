"""The runs that `kills.py` kills: a tiny model, its tokens, and the base of a fine-tune."""

import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from llama_jax.checkpoint.model_folders import save_model
from llama_jax.config.lora import LoraConfig
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.model import ModelConfig
from llama_jax.config.run import (
    CheckpointConfig,
    Config,
    DataConfig,
    LocalCheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainingConfig,
)
from llama_jax.data.tokenize import tokenize_corpus
from llama_jax.model.weights import Llama
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.runtime.storage import AnyPath
from llama_jax.tokenizer.tokenizer import load_tokenizer


def make_environment(folder: Path) -> dict[str, str]:
    """Returns the environment of the processes: one CPU device, and programs stored in `folder`."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def make_config(
    tokens: AnyPath, folder: AnyPath, processes: int, steps: int, disk: Path | None
) -> Config:
    """Returns the configuration of a run of a tiny model.

    Args:
        tokens: token shards.
        folder: of the run.
        processes: one a host, with one device each.
        steps: of the run.
        disk: for the local checkpoints of all hosts, each of which then has a replica.
    """
    replicas = 2 if disk else 1
    checkpoint = CheckpointConfig(every=10, keep=2)
    if disk:
        checkpoint = CheckpointConfig(
            every=60, keep=2, local=LocalCheckpointConfig(path=str(disk), every=3)
        )
    return Config(
        model=ModelConfig(
            dim=32, n_layers=1, n_heads=4, n_kv_heads=4, head_dim=8, hidden_dim=64, vocab_size=320,
            context=64, dtype="float32", remat="none",
        ),
        mesh=MeshConfig(data=replicas, fsdp=processes // replicas, tensor=1),
        data=DataConfig(mixture={str(tokens): 1.0}, batch_size=4, seq_len=16),
        optimizer=OptimizerConfig(warmup_steps=4, peak_lr=1e-2),
        training=TrainingConfig(out=str(folder), steps=steps, eval_every=0, eval_batches=1),
        checkpoint=checkpoint,
        logging=LoggingConfig(progress=False, tensorboard=False),
    )  # fmt: skip


def write_tokens(texts: Path, folder: AnyPath) -> None:
    """Tokenizes random words into `folder`."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeioukltnrs"), rng.integers(2, 8))) for _ in range(200)]
    lines = (json.dumps({"text": " ".join(rng.choice(words, 80))}) for _ in range(60))
    texts.write_text("\n".join(lines))
    tokenize_corpus([str(texts)], folder, n_vocab=320, validation_fraction=0.1, progress=False)


def write_base(folder: AnyPath, config: ModelConfig, tokenizer: Path) -> None:
    """Writes the folder of a model with random weights."""
    with jax.set_mesh(one_device_mesh()):
        model = jax.jit(Llama, static_argnums=0)(config, jax.random.key(0))
        save_model(folder, config, model, load_tokenizer(tokenizer))


def fine_tune(config: Config, kind: str, data: Path, base: AnyPath) -> Config:
    """Returns the configuration of a LoRA run on `data`; `kind` is lora or dpo."""
    objective = "dpo" if kind == "dpo" else "next_token"
    return replace(
        config,
        data=replace(config.data, mixture={str(data): 1.0}),
        lora=LoraConfig(rank=4, alpha=8.0, dropout=0.1),
        training=replace(config.training, init_from=str(base), objective=objective),
    )
