"""What folders and files of checkpoints say of themselves, their weights aside."""

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
    """Tells whether `folder` is a run folder (and not a model folder)."""
    return (folder / "config.yaml").is_file()


def checkpoint_format(path: Path) -> CheckpointFormat | None:
    """Returns the format of the checkpoint at `path`, from file names and first bytes alone.

    None where no file says what model it is. Our own folders are 'orbax'.

    Raises:
        InputError: the path is neither a folder nor a regular file.
        OSError: it is a file that can't be read.
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
    """Tells whether a file begins like one of llama2.c's, given its first 28 bytes."""
    if start[:4] == LLAMA2C_MAGIC:
        return True
    sizes = struct.unpack("<7i", start) if len(start) == 28 else (0,) * 7
    dim, hidden, layers, heads, kv, vocab, context = sizes
    plausible = all(0 < n < 1 << 24 for n in (dim, hidden, layers, heads, kv, abs(vocab), context))
    return plausible and dim % heads == 0


def read_model_config(folder: str | Path) -> ModelConfig:
    """Returns the shape of the model in a model folder or run folder.

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
    """Returns the error about a path that is no folder of ours, with what makes one of it."""
    if not path.exists():
        return InputError(
            f"{path} does not exist: give a folder that has a config.yaml or a config.json"
        )
    source, kind = path, checkpoint_format(path)
    if kind is None and path.is_file():  # weights alone, in the folder of a checkpoint
        source, kind = path.parent, checkpoint_format(path.parent)
    if kind not in _NAMES:
        return InputError(
            f"{path} is neither a run folder nor a model folder: give one that has a config.yaml or"
            " a config.json"
        )
    command, folder = _conversion(source, kind)
    return InputError(
        f"{path} is a checkpoint in {_NAMES[kind]}'s format: convert it with `{command}`, then give"
        f" {folder}"
    )


def _conversion(source: Path, kind: CheckpointFormat) -> tuple[str, str]:
    """Returns the shell command that converts a checkpoint, and the folder that it makes."""
    if kind == "gguf" and source.is_dir():
        source = min(source.glob("*.gguf"))
    place = source.resolve()
    name = place.name if source.is_dir() else place.stem
    if name == "original":  # where Hugging Face's folders of Llama 3 hold Meta's
        name = place.parent.name
    elif place.parent.name == "snapshots":  # in Hugging Face's cache: models--ORG--NAME
        name = place.parents[1].name.rpartition("--")[2]
    folder, number = f"models/{name}", 1
    while os.path.lexists(folder):
        number += 1
        folder = f"models/{name}-{number}"
    words = ["llama-jax", "convert", _argument(source), folder]
    beside = (source.parent / file for file in _TOKENIZERS)
    tokenizer = next((f for f in beside if kind == "llama2c" and f.is_file()), None)
    words += ["--tokenizer", _argument(tokenizer)] if tokenizer else []
    return shlex.join(words), folder


def _argument(path: Path) -> str:
    """Returns a path as the command line takes it: a dash in front would make it an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def _check_receipt(path: Path, config: ModelConfig) -> None:
    """Refuses a configuration that is not the one that the weights were converted with."""
    if not path.is_file():
        return
    try:
        converted = ModelConfig(**json.loads(read_regular(path))["config"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: convert the model again") from error
    changed = config.differences(converted)
    if changed:
        key = changed[0]
        says, had = (f"{getattr(c, key)}"[:80] for c in (config, converted))
        raise InputError(
            f"{path.with_name('config.json')} says {key} {says}, but the weights were converted"
            f" with {had} ({path.name}): correct it"
        )


def read_run_config(folder: Path) -> Config:
    """Returns the configuration that a run was started with."""
    return yaml_file.load(folder / "config.yaml")


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a run folder, ascending, without Orbax.

    Orbax writes a checkpoint beside its place and renames it: a folder with a step's name is whole.
    """
    names = (path.name for path in (folder / "checkpoints").glob("*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())
