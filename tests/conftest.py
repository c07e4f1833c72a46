"""Shared by all tests: 8 simulated devices, a tiny model, the folder of real data."""

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig, TrainingConfig
from llama_jax.data import corpus
from llama_jax.family import ModelConfig
from llama_jax.sharding import make_mesh, one_device_mesh

jax.config.update("jax_num_cpu_devices", 8)
# Compiling is what costs: tests, and the processes they start, share what one of them compiled.
_cache = tempfile.TemporaryDirectory(prefix="llama_jax-compiled-")
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

# Meshes (data, fsdp, tensor) on which every result must agree.
MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4)]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and reference results that lies beside a full checkout."""
    data = SHARED / "data"
    if data.is_dir():
        return data
    if SHARED.is_dir():
        pytest.fail(f"{SHARED} is there, but {data} is not")
    pytest.skip("needs ../shared/data (reference models and logits), which is not here")


def mesh_of(shape: tuple[int, int, int]) -> jax.sharding.Mesh:
    """Returns a mesh (data, fsdp, tensor) of the first simulated devices."""
    data, fsdp, tensor = shape
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    return make_mesh(config, jax.devices()[: data * fsdp * tensor])


@pytest.fixture
def one_device():
    """Puts the test on a mesh of one device."""
    with jax.set_mesh(one_device_mesh()):
        yield


def tiny_model(**changes: Any) -> ModelConfig:
    """Returns a model small enough for tests, in float32, that every mesh of MESHES divides."""
    shape: dict[str, Any] = {
        "dim": 32, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "head_dim": 8,
        "hidden_dim": 64, "vocab_size": 320, "context": 64, "dtype": "float32", "remat": "none",
    }  # fmt: skip
    return ModelConfig(**(shape | changes))


def tiny_config(model: ModelConfig | None = None, **training: Any) -> Config:
    """Returns a run's configuration around a tiny model; its data are named, not there."""
    return Config(
        model=model or tiny_model(),
        data=DataConfig(mixture={"nowhere": 1.0}, batch_size=8, seq_len=16),
        optimizer=OptimizerConfig(warmup_steps=2, peak_lr=1e-2),
        training=TrainingConfig(**({"out": "nowhere", "steps": 10} | training)),
    )


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of token shards made from 60 documents of made-up prose, 320 tokens."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeioukltnrs"), rng.integers(2, 8))) for _ in range(200)]
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(60):
        text = " ".join(rng.choice(words, rng.integers(5, 120)))
        (folder / f"{i:02d}.txt").write_text(text + "\n")
    out = folder / "tokens"
    corpus.build([str(folder / "*.txt")], out, n_vocab=320, validation_fraction=0.1, progress=False)
    return out
