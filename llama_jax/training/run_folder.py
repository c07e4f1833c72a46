"""The folder of a run: whose it is, what it was started with, what it must not forget."""

import contextlib
import dataclasses
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_jax import checkpoint, config_file
from llama_jax.config import Config
from llama_jax.data.batches import Batches
from llama_jax.data.tokenizer import load_tokenizer
from llama_jax.errors import InputError
from llama_jax.training.progress import tell

# A resumed run must be the run that it was. These keys may change, and the change is told.
CHANGEABLE = ("model.remat", "model.scan", "mesh", "data.mixture", "data.corpus", "data.tokenizer")
CHANGEABLE += ("data.validation_fraction", "training.out", "training.steps")
CHANGEABLE += ("training.micro_batches", "training.max_skipped", "training.eval_every")
CHANGEABLE += ("training.eval_batches", "checkpoint", "logging")


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Makes the run folder and keeps a second process out of it while this one runs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise InputError(f"can't write the run folder {folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another process is training in {folder}: wait for it, or choose another"
                " training.out"
            ) from error
        yield


def check_unchanged(config: Config, folder: Path) -> None:
    """Refuses to resume with another configuration, and tells of harmless changes."""
    before = dict(_flat(dataclasses.asdict(checkpoint.read_run_config(folder))))
    for name, value in _flat(dataclasses.asdict(config)):
        old = before.get(name)
        if value == old:
            continue
        if any(name == key or name.startswith(key + ".") for key in CHANGEABLE):
            tell(f"{folder}: {name} changes from {old} to {value}")
        else:
            raise InputError(
                f"{folder} was trained with {name} = {old}, and now it is {value}: change it back"
                " to resume, or choose another training.out"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and prefix + name != "data.mixture":
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def write_run_files(config: Config, data: Batches, folder: Path) -> None:
    """Leaves the resolved configuration and the tokenizer in the run folder."""
    partial = folder / ".config.partial"
    partial.write_text(config_file.dump(config))
    partial.replace(folder / "config.yaml")
    tokenizer = load_tokenizer(data.splits["train"][0].folder).path
    if not (folder / tokenizer.name).exists():
        shutil.copyfile(tokenizer, partial)
        partial.replace(folder / tokenizer.name)
