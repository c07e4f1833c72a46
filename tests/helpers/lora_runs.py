"""Low-rank pairs with random numbers: in memory, and as the run folder of a LoRA run."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from conftest import tiny_model

from llama_jax.checkpoint.folders import read_model_config
from llama_jax.checkpoint.lora_pairs import Pair, StoredPairs, load_adapters, pair_shapes
from llama_jax.checkpoint.model_folders import manifest_hash, save_model
from llama_jax.checkpoint.training_checkpoints import Progress, TrainingCheckpoints
from llama_jax.config import yaml_file
from llama_jax.config.lora import LoraConfig
from llama_jax.config.model import ModelConfig
from llama_jax.config.run import CheckpointConfig, Config, DataConfig, TrainingConfig
from llama_jax.model.weights import Llama
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.tokenizer.tokenizer import load_tokenizer

LORA = LoraConfig(rank=4, alpha=6.0)


def random_pairs(config: ModelConfig, lora: LoraConfig = LORA, seed: int = 0) -> StoredPairs:
    """Returns pairs whose product has elements of about 0.1, so that each changes the logits."""

    def read(name: str, layer: int) -> Pair:
        rng = np.random.default_rng([seed, lora.targets.index(name), layer])
        shapes = pair_shapes(config, lora, name)
        a, b = (0.3 * rng.standard_normal(shape, np.float32) for shape in shapes)
        return Pair(a, b)

    return StoredPairs(Path("random"), lora, None, read)


def write_base(folder: Path, tokenizer: Path | None = None, **changes: Any) -> Path:
    """Writes the folder of a tiny model with random weights."""
    config = tiny_model(**changes)
    with jax.set_mesh(one_device_mesh()):
        model = jax.jit(Llama, static_argnums=0)(config, jax.random.key(1))
        save_model(folder, config, model, tokenizer and load_tokenizer(tokenizer))
    return folder


def write_lora_run(
    folder: Path,
    base: Path,
    lora: LoraConfig = LORA,
    tokenizer: Path | None = None,
    seed: int = 0,
    **model: Any,
) -> Path:
    """Writes the folder of a LoRA run with one checkpoint of random pairs.

    Args:
        folder: to create.
        base: the model folder.
        lora: rank and targets.
        tokenizer: folder of the tokenizer of the training data.
        seed: of the pairs.
        model: fields of the run's configuration that differ from the base's.
    """
    stored = read_model_config(base)
    config = Config(
        model=ModelConfig(**(vars(stored) | model)),
        data=DataConfig(mixture={"nowhere": 1.0}, batch_size=8, seq_len=16),
        training=TrainingConfig(out=str(folder), init_from=str(base), steps=1),
        lora=lora,
    )
    with jax.set_mesh(one_device_mesh()):
        adapters = load_adapters(config.model, random_pairs(config.model, lora, seed))
        checkpoints = TrainingCheckpoints(folder / "checkpoints", CheckpointConfig())
        state: Any = {"count": jax.numpy.zeros((), np.int32)}
        checkpoints.save(Progress(1, [], manifest_hash(base)), adapters, state)
        checkpoints.close()
    (folder / "config.yaml").write_text(yaml_file.dump(config))
    for name, content in (load_tokenizer(tokenizer).files if tokenizer else {}).items():
        (folder / name).write_bytes(content)
    return folder
