"""Recognizes checkpoints by their files, and reads their configurations; reads no weights."""

import json
import os
import shlex
import struct
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from llama_jax.config import yaml_file
from llama_jax.config.model import ModelConfig
from llama_jax.config.run import Config
from llama_jax.config.validation import first_problem
from llama_jax.errors import InputError
from llama_jax.runtime.regular_file import open_regular, read_regular
from llama_jax.runtime.storage import check_local

CheckpointFormat = Literal["meta", "huggingface", "gguf", "llama2c", "orbax"]
LLAMA2C_MAGIC = b"24ka"  # 'ak42', little-endian; since version 1
_NAMES = {"meta": "Meta", "huggingface": "Hugging Face", "gguf": "GGUF", "llama2c": "llama2.c"}
_TOKENIZERS = ("tokenizer.model", "tokenizer.json", "tokenizer.bin")


def is_run_folder(folder: Path) -> bool:
    """Returns whether `folder` is a run folder (and not a model folder)."""
    return (folder / "config.yaml").is_file()


def checkpoint_format(path: Path) -> CheckpointFormat | None:
    """Returns the format of the checkpoint at `path`, by its file names and first bytes.

    'orbax' for model folders and run folders; None if no file describes a model.

    Raises:
        InputError: the path is neither a folder nor a regular file.
        OSError: the file can't be read.
    """
    if not path.is_dir():
        with open_regular(path) as file:
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


def read_model_config(folder: str | Path) -> ModelConfig:
    """Returns the configuration of the model in a model folder or run folder.

    Raises:
        InputError: the folder is neither, or its configuration is damaged.
    """
    folder = Path(check_local(str(folder)))
    if is_run_folder(folder):
        return read_run_config(folder).model
    path = folder / "config.json"
    content = read_regular(path) if path.is_file() else None
    theirs = content and b'"model_type"' in content and not (folder / "weights").exists()
    if content is None or theirs:
        raise _not_ours(folder)
    try:
        config = TypeAdapter(ModelConfig).validate_json(content)
    except ValidationError as error:
        raise InputError(
            f"{path} is not the configuration of a llama_jax model"
            f" ({first_problem(error).sentence()}): correct it"
        ) from error
    _check_receipt(folder / "receipt.json", config)
    return config


def _not_ours(path: Path) -> InputError:
    """Returns the error for a path that is no model or run folder.

    If it is a checkpoint of another format, the message contains the command that converts it.
    """
    if not path.exists():
        return InputError(
            f"{path} does not exist: give a folder that contains a config.yaml or a config.json"
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


def _conversion(source: Path, kind: CheckpointFormat) -> tuple[str, str]:
    """Returns the shell command that converts a checkpoint, and the folder that it creates."""
    if kind == "gguf" and source.is_dir():
        source = min(source.glob("*.gguf"))
    path = source.resolve()
    name = path.name if source.is_dir() else path.stem
    if name == "original":  # Meta's files in Hugging Face's folders of Llama 3
        name = path.parent.name
    elif path.parent.name == "snapshots":  # in Hugging Face's cache: models--ORG--NAME
        name = path.parents[1].name.rpartition("--")[2]
    folder, number = f"models/{name}", 1
    while os.path.lexists(folder):
        number += 1
        folder = f"models/{name}-{number}"
    words = ["llama-jax", "convert", _argument(source), folder]
    candidates = (source.parent / file for file in _TOKENIZERS)
    tokenizer = next((f for f in candidates if kind == "llama2c" and f.is_file()), None)
    words += ["--tokenizer", _argument(tokenizer)] if tokenizer else []
    return shlex.join(words), folder


def _argument(path: Path) -> str:
    """Returns a path as a command-line argument: a leading dash would make it an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def _check_receipt(path: Path, config: ModelConfig) -> None:
    """Checks that the configuration is the one with which the weights were converted.

    Raises:
        InputError: it differs from the receipt's.
    """
    if not path.is_file():
        return
    try:
        converted = ModelConfig(**json.loads(read_regular(path))["config"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: convert the model again") from error
    changed = config.differences(converted)
    if changed:
        key = changed[0]
        value, expected = (f"{getattr(c, key)}"[:80] for c in (config, converted))
        raise InputError(
            f"{path.with_name('config.json')} has {key} {value}, but the weights were converted"
            f" with {expected} ({path.name}): correct it"
        )


def read_run_config(folder: Path) -> Config:
    """Returns the configuration with which a run was started."""
    return yaml_file.load(folder / "config.yaml")


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a run folder, ascending, without Orbax.

    Orbax writes a checkpoint under a temporary name and renames it: a folder whose name is a step
    is complete.
    """
    names = (path.name for path in (folder / "checkpoints").glob("*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())
