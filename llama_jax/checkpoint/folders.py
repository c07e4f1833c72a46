"""Recognizes checkpoints by their files, and reads their configurations; reads no weights."""

import os
import shlex
import struct
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from llama_jax.config import yaml_file
from llama_jax.config.model import ModelConfig
from llama_jax.config.run import Config
from llama_jax.config.validation import first_problem
from llama_jax.errors import InputError
from llama_jax.runtime import manifest
from llama_jax.runtime.damage import Damaged
from llama_jax.runtime.manifest import verified_manifest
from llama_jax.runtime.storage import AnyPath, open_file, parse_path, read_file, read_many

CheckpointFormat = Literal["meta", "huggingface", "gguf", "llama2c", "orbax"]
LLAMA2C_MAGIC = b"24ka"  # 'ak42', little-endian; since version 1
_NAMES = {"meta": "Meta", "huggingface": "Hugging Face", "gguf": "GGUF", "llama2c": "llama2.c"}
_TOKENIZERS = ("tokenizer.model", "tokenizer.json", "tokenizer.bin")


def is_run_folder(folder: AnyPath) -> bool:
    """Returns whether `folder` is a run folder (and not a model folder)."""
    return (folder / "config.yaml").is_file()


def is_lora_run(folder: AnyPath) -> bool:
    """Returns whether `folder` is the run folder of a LoRA run."""
    return is_run_folder(folder) and read_run_config(folder).lora is not None


def checkpoint_format(path: AnyPath) -> CheckpointFormat | None:
    """Returns the format of the checkpoint at `path`, by its file names and first bytes.

    'orbax' for model folders and run folders; None if no file describes a model.

    Raises:
        InputError: the path is neither a folder nor a regular file.
        OSError: the file can't be read.
    """
    if not path.is_dir():
        with open_file(path) as file:
            start = file.read(28)
        return "gguf" if start[:4] == b"GGUF" else "llama2c" if _is_llama2c(start) else None
    if (path / "params.json").exists():
        return "meta"
    if is_run_folder(path) or (path / "weights").exists():
        return "orbax"
    if (path / "config.json").exists():
        return "huggingface"
    return "gguf" if any(path.glob("*.gguf")) else None


def _is_llama2c(start: bytes) -> bool:
    """Returns whether `start`, the first 28 bytes of a file, is a header of llama2.c."""
    if start[:4] == LLAMA2C_MAGIC:
        return True
    sizes = struct.unpack("<7i", start) if len(start) == 28 else (0,) * 7
    dim, hidden, layers, heads, kv, vocab, context = sizes
    plausible = all(0 < n < 1 << 24 for n in (dim, hidden, layers, heads, kv, abs(vocab), context))
    return plausible and dim % heads == 0


def read_model_config(folder: str | AnyPath) -> ModelConfig:
    """Returns the configuration of the model in a model folder or run folder.

    Raises:
        InputError: the folder is neither, or its configuration is damaged.
    """
    folder = parse_path(folder)
    if is_run_folder(folder):
        return read_run_config(folder).model
    path = folder / "config.json"
    content = read_file(path) if path.is_file() else None
    is_huggingface = content and b'"model_type"' in content and not (folder / "weights").exists()
    if content is None or is_huggingface:
        raise _not_ours(folder)
    try:
        config = TypeAdapter(ModelConfig).validate_json(content)
    except ValidationError as error:
        raise InputError(
            f"{path} is not the configuration of a llama_jax model"
            f" ({first_problem(error).sentence()}): correct it"
        ) from error
    _check_unchanged(path, config)
    return config


def _not_ours(path: AnyPath) -> InputError:
    """Returns the error for a path that is no model or run folder.

    If it is a checkpoint of another format, the message contains the command that converts it.
    """
    if not path.exists():
        return InputError(
            f"{path} does not exist: give a folder that contains a config.yaml or a config.json"
        )
    if (path / "adapter_config.json").is_file():
        return InputError(
            f"{path} contains low-rank pairs of PEFT, and no model: give the model that they belong"
            f" to, with --lora {path}"
        )
    source, kind = path, checkpoint_format(path)
    if kind is None and path.is_file():  # a file of weights in the folder of a checkpoint
        source, kind = path.parent, checkpoint_format(path.parent)
    if kind not in _NAMES:
        return InputError(
            f"{path} is neither a run folder nor a model folder: give one that contains a"
            " config.yaml or a config.json"
        )
    command, folder = _conversion(source, kind)
    return InputError(
        f"{path} is a checkpoint in {_NAMES[kind]}'s format: convert it with `{command}`, then give"
        f" {folder}"
    )


def _conversion(source: AnyPath, kind: CheckpointFormat) -> tuple[str, str]:
    """Returns the shell command that converts a checkpoint, and the folder that it creates."""
    if kind == "gguf" and source.is_dir():
        source = min(source.glob("*.gguf"))
    path = source.resolve()
    name = path.name if source.is_dir() else path.stem
    if name == "original":  # Meta's files in Hugging Face's folders of Llama 3
        name = path.parent.name
    elif path.parent.name == "snapshots":  # in Hugging Face's cache: models--ORG--NAME
        name = path.parent.parent.name.rpartition("--")[2]
    folder, number = f"models/{name}", 1
    while os.path.lexists(folder):
        number += 1
        folder = f"models/{name}-{number}"
    words = ["llama-jax", "convert", _argument(source), folder]
    candidates = (source.parent / file for file in _TOKENIZERS)
    tokenizer = next((f for f in candidates if kind == "llama2c" and f.is_file()), None)
    words += ["--tokenizer", _argument(tokenizer)] if tokenizer else []
    return shlex.join(words), folder


def _argument(path: AnyPath) -> str:
    """Returns a path as a command-line argument: a leading dash would make it an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def _check_unchanged(path: AnyPath, config: ModelConfig) -> None:
    """Refuses a configuration that differs from the one with which the weights were written.

    How the model is computed (dtype, attention …) may change.
    """
    try:
        written = ModelConfig(**verified_manifest(path.parent)["config"])
    except (KeyError, TypeError, ValidationError) as error:
        raise Damaged(path.parent, f"{manifest.NAME} is not that of a model folder") from error
    changed = config.differences(written)
    if changed:
        key = changed[0]
        now, then = (f"{getattr(c, key)}"[:80] for c in (config, written))
        raise InputError(
            f"{path} contains {key} {now}, but the weights were written with {then}: correct it"
        )


def read_run_config(folder: AnyPath) -> Config:
    """Returns the configuration with which a run was started."""
    return yaml_file.load(folder / "config.yaml")


def committed_steps(checkpoints: AnyPath) -> tuple[list[int], list[int]]:
    """Returns the steps of the checkpoints with and without a manifest, each ascending.

    Args:
        checkpoints: the folder `checkpoints` of a run.
    """
    try:  # without is_dir, which in a bucket would list all objects a second time
        found = [path.name for path in checkpoints.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        found = []
    steps = sorted(int(name) for name in found if name.isdecimal())
    manifests = read_many(checkpoints, [f"{step}/{manifest.NAME}" for step in steps])
    complete = [s for s in steps if manifests[f"{s}/{manifest.NAME}"] is not None]
    return complete, [s for s in steps if s not in complete]
