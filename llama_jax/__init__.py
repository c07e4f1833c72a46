"""LLaMA in JAX and Flax for TPU pods and GPUs: training, inference, checkpoint conversion.

The names that a notebook needs, under `import llama_jax as lj`:

- models: `convert_checkpoint`, `load`, `load_tokenizer`, `save_model`
- inference: `complete` (text), `forward` (logits), `generate` (batches of tokens), `Sampling`
- training: `load_config`, `train` (a complete run); `initial_state`, `train_step`, `Batch` (a loop
  of your own)
- `FAMILY`, `Config`, `Tokenizer`

Import all other names from their modules. docs/notebook.ipynb is an example.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.checkpoint.model_folders import save_model
    from llama_jax.config.family import FAMILY
    from llama_jax.config.run import Config
    from llama_jax.config.yaml_file import load as load_config
    from llama_jax.convert.convert import convert as convert_checkpoint
    from llama_jax.data.windows import Batch
    from llama_jax.inference.complete import complete
    from llama_jax.inference.generate import generate
    from llama_jax.inference.load import load
    from llama_jax.inference.sampling import Sampling
    from llama_jax.model.transformer import forward
    from llama_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer
    from llama_jax.training.loop import run as train
    from llama_jax.training.start import initial_state
    from llama_jax.training.step import train_step

__version__ = "0.2.0"

__all__ = [
    "FAMILY", "Batch", "Config", "Sampling", "Tokenizer", "complete", "convert_checkpoint",
    "forward", "generate", "initial_state", "load", "load_config", "load_tokenizer", "save_model",
    "train", "train_step",
]  # fmt: skip

# Imported on first use, because `llama-jax --help` must not wait for JAX.
_MODULES = {
    "FAMILY": "config.family.FAMILY",
    "Batch": "data.windows.Batch",
    "Config": "config.run.Config",
    "Sampling": "inference.sampling.Sampling",
    "Tokenizer": "tokenizer.tokenizer.Tokenizer",
    "complete": "inference.complete.complete",
    "convert_checkpoint": "convert.convert.convert",
    "forward": "model.transformer.forward",
    "generate": "inference.generate.generate",
    "initial_state": "training.start.initial_state",
    "load": "inference.load.load",
    "load_config": "config.yaml_file.load",
    "load_tokenizer": "tokenizer.tokenizer.load_tokenizer",
    "save_model": "checkpoint.model_folders.save_model",
    "train": "training.loop.run",
    "train_step": "training.step.train_step",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, own_name = _MODULES[name].rpartition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), own_name)


def __dir__() -> list[str]:
    return sorted(__all__)
