"""Fixtures for all tests: 8 simulated devices, a tiny model, the folder of reference data."""

import atexit
import functools
import gc
import gzip
import importlib
import itertools
import math
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Temporary folders are in memory: a save syncs each file of a checkpoint, which takes more than a
# second for a tiny model on a disk, and 0.1 s in memory. No test crashes the machine, so none can
# tell the difference.
os.environ.setdefault(
    "TMPDIR",
    "/dev/shm"
    if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 8 << 30
    else "/tmp",
)
# Set before JAX is imported, here and in processes that tests start: otherwise JAX looks for a TPU
# if the TPU compiler is installed.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compilation takes most of the time of the tests: processes share compiled programs, and LLVM
# optimizes little, because each program runs briefly. XLA's own passes are the same as for users.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(
    prefix="llama_jax-compiled-", dir=os.environ["TMPDIR"]
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Otherwise the key of a program contains the path of the cache.
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Threads of XLA:CPU. By default it has one for each device. Independent collectives of a stored
# program can hold all of them and wait for each other, until XLA aborts.
os.environ["NPROC"] = "32"
# XLA:CPU's older code generator compiles a gradient four times as fast as its fusion emitters. JAX
# 0.12 no longer has it, and XLA aborts at an unknown flag. One LLVM module per program takes less
# time than 32.
if "PYTEST_XDIST_WORKER" not in os.environ:  # which has the flags of the process that started it
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            "--xla_cpu_parallel_codegen_split_count=1",
            *["--xla_cpu_use_fusion_emitters=false"] * version("jaxlib").startswith("0.10."),
        ]
    )

import jax
import numpy as np
import pytest
from chat_shards import write_packed_shards
from compiled_programs import copy_stored, store_new

from llama_jax.checkpoint.folders import read_model_config
from llama_jax.checkpoint.model_folders import load_model, save_model
from llama_jax.cli.main import main
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.model import ModelConfig
from llama_jax.config.run import Config, DataConfig, OptimizerConfig, TrainingConfig
from llama_jax.convert.convert import convert
from llama_jax.data import tokenize
from llama_jax.model.weights import Llama
from llama_jax.parallel.mesh import make_mesh, one_device_mesh
from llama_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer

jax.config.update("jax_num_cpu_devices", 8)
tempfile.tempdir = os.environ["TMPDIR"]  # pytest has already asked for a temporary file
atexit.register(store_new, Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))
# A trace creates many objects, few of them in cycles. The search for those took 5 % of the time.
gc.set_threshold(100_000, 50, 1000)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

# Checkpoints in ../shared/data/meta_reference: one or two Meta files, or a Hugging Face folder.
REFERENCES = [
    *("llama1_mha/mp1", "llama2_mha/mp1", "llama2_mha/mp2"),
    *("llama2_gqa/mp1", "llama2_gqa/mp2", "llama2_gqa/hf"),
    *("llama3_gqa/mp1", "llama3_gqa/mp2", "llama31_scaled/mp1", "llama31_scaled/hf"),
]

# Meshes (data, fsdp, tensor) on which every result must be equal.
MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4)]
# Meshes (data, fsdp, tensor, context), for training.
CONTEXT_MESHES = [(1, 1, 1, 8), (1, 2, 1, 4), (2, 1, 2, 2)]


def pytest_configure(config: pytest.Config) -> None:
    """Copies the compiled programs of earlier runs into the processes that run tests."""
    if not config.getoption("numprocesses", None):  # else this process only starts others
        copy_stored(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts the files with the most slow tests first, so that both processes end together."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


_numbers = itertools.count()


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """A folder of the test, at a path that no earlier test had.

    pytest removes the folders of passed tests and uses their paths again, but TensorStore caches
    the token shards that it has read by their path.
    """
    folder = tmp_path / f"folder{next(_numbers)}"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Frees the compiled programs after each test file.

    Those of all files take 6 GB and 40,000 memory mappings, and Linux allows a process 65,530. Some
    files also trace the same functions as for another platform.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and reference results, next to a complete checkout."""
    data = SHARED / "data"
    if data.is_dir():
        return data
    if SHARED.is_dir():
        pytest.fail(f"{SHARED} exists, but {data} doesn't")
    pytest.skip("needs ../shared/data (reference models and logits), which is missing")


@pytest.fixture(scope="session")
def llama2(shared_data: Path) -> Tokenizer:
    """The tokenizer of LLaMA and Llama 2."""
    return load_tokenizer(shared_data / "tokenizers" / "llama_sentencepiece_32000.model")


@pytest.fixture(scope="session")
def llama3(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer of Llama 3."""
    path = tmp_path_factory.mktemp("llama3") / "tokenizer.model"
    packed = shared_data / "tokenizers" / "llama3_tiktoken_128000.model.gz"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    return load_tokenizer(path)


def peer(name: str) -> Any:
    """Returns a package to compare with; skips the test if it is not installed, except in CI."""
    if "CI" not in os.environ:
        return pytest.importorskip(name, reason=f"compares with {name}, which is not installed")
    return importlib.import_module(name)


def mesh_of(shape: tuple[int, ...]) -> jax.sharding.Mesh:
    """Returns a mesh (data, fsdp, tensor, or also context) of the first simulated devices."""
    data, fsdp, tensor, context = (*shape, 1)[:4]
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, context=context)
    return make_mesh(config, jax.devices()[: math.prod(shape)])


_models = tempfile.TemporaryDirectory(prefix="llama_jax-models-")


@functools.cache
def _converted(path: Path) -> Path:
    return convert(path, Path(tempfile.mkdtemp(dir=_models.name), "model"), progress=False).folder


def load_reference(path: Path) -> tuple[ModelConfig, Llama]:
    """Returns the model of a Meta or Hugging Face checkpoint on the current mesh, in float32."""
    folder = _converted(path)
    config = replace(read_model_config(folder), dtype="float32", param_dtype="float32")
    return load_model(folder, config)


@pytest.fixture
def one_device():
    """Runs the test on a mesh of one device."""
    with jax.set_mesh(one_device_mesh()):
        yield


def tiny_model(**changes: Any) -> ModelConfig:
    """Returns the configuration of a tiny float32 model that every mesh in MESHES can shard."""
    shape: dict[str, Any] = {
        "dim": 32, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "head_dim": 8,
        "hidden_dim": 64, "vocab_size": 320, "context": 64, "dtype": "float32", "remat": "none",
    }  # fmt: skip
    return ModelConfig(**(shape | changes))


def tiny_config(model: ModelConfig | None = None, **training: Any) -> Config:
    """Returns the configuration of a run of a tiny model; its data folder doesn't exist."""
    return Config(
        model=model or tiny_model(),
        data=DataConfig(mixture={"nowhere": 1.0}, batch_size=8, seq_len=16),
        optimizer=OptimizerConfig(warmup_steps=2, peak_lr=1e-2),
        training=TrainingConfig(**({"out": "nowhere", "steps": 10} | training)),
    )


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of token shards of 60 documents of random words, with a vocabulary of 320."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeioukltnrs"), rng.integers(2, 8))) for _ in range(200)]
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(60):
        text = " ".join(rng.choice(words, rng.integers(5, 120)))
        (folder / f"{i:02d}.txt").write_text(text + "\n")
    out = folder / "tokens"
    tokenize.tokenize_corpus(
        [str(folder / "*.txt")], out, n_vocab=320, validation_fraction=0.1, progress=False
    )
    return out


@pytest.fixture(scope="session")
def other_token_folder(token_folder: Path) -> Path:
    """A folder of token shards of 40 of these documents, with the same tokenizer."""
    out = token_folder.with_name("other")
    tokenize.tokenize_corpus(
        [str(token_folder.parent / "[0-3]*.txt")], out,
        tokenizer=str(token_folder / "tokenizer.model"), validation_fraction=0.1, progress=False,
    )  # fmt: skip
    return out


@pytest.fixture(scope="session")
def chat_folder(token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 200 chats of random tokens in windows of 16, with `token_folder`'s tokenizer."""
    folder = tmp_path_factory.mktemp("packed") / "chats"
    write_packed_shards(folder, token_folder, "chats")
    return folder


@pytest.fixture(scope="session")
def preference_folder(token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 200 preferences of random tokens, as `chat_folder`."""
    folder = tmp_path_factory.mktemp("packed") / "preferences"
    write_packed_shards(folder, token_folder, "preferences")
    return folder


@pytest.fixture(scope="session")
def model_folder(token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with random weights and the tokenizer of `token_folder`."""
    folder = tmp_path_factory.mktemp("models") / "model"
    config = tiny_model(context=128)
    with jax.set_mesh(one_device_mesh()):
        model = jax.jit(Llama, static_argnums=0)(config, jax.random.key(0))
        save_model(folder, config, model, load_tokenizer(token_folder))
    return folder


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Runs a command; returns its exit code, standard output and standard error."""
    code = main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err
