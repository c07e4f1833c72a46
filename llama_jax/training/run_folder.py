"""The folder of a run: its configuration and its tokenizer."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from llama_jax.checkpoint import folders
from llama_jax.config import yaml_file
from llama_jax.config.run import Config
from llama_jax.data.batches import Batches
from llama_jax.errors import InputError
from llama_jax.runtime.console import print_status
from llama_jax.runtime.storage import AnyPath, read_many, write_many
from llama_jax.tokenizer.tokenizer import load_tokenizer

# A resumed run must continue the same run. Only these keys may change; the change is printed.
CHANGEABLE = ("model.remat", "model.scan", "mesh", "data.mixture", "data.corpus", "data.tokenizer")
CHANGEABLE += ("data.validation_fraction", "training.out", "training.steps")
CHANGEABLE += ("training.micro_batches", "training.max_skipped", "training.eval_every")
CHANGEABLE += ("training.init_from",)  # used only before the first checkpoint
CHANGEABLE += ("training.eval_batches", "checkpoint", "logging")
# The learning rate of the remaining steps; `schedule_change` prints the consequence.
CHANGEABLE += ("optimizer.schedule", "optimizer.decay_steps", "optimizer.final_lr_fraction")


def check_unchanged(config: Config, folder: AnyPath) -> Config:
    """Compares the configuration with that of the run, and prints the allowed changes.

    Returns:
        The configuration of the run until now.

    Raises:
        InputError: a key outside of `CHANGEABLE` has changed.
    """
    previous_config = folders.read_run_config(folder)
    previous = dict(flatten(dataclasses.asdict(previous_config)))
    now = dict(flatten(dataclasses.asdict(config)))
    for name in {**now, **previous}:  # a section that is null has no keys
        value, old = now.get(name), previous.get(name)
        if value == old:
            continue
        if any(name == key or name.startswith(key + ".") for key in CHANGEABLE):
            print_status(f"{folder}: {name} changes from {old} to {value}")
        else:
            raise InputError(
                f"{folder} was trained with {name} = {old}, and now it is {value}: change it back"
                " to resume, or choose another training.out"
            )
    return previous_config


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the keys of a configuration, as 'section.key', with their values."""
    for name, value in values.items():
        if isinstance(value, dict) and prefix + name != "data.mixture":
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def write_run_files(config: Config, data: Batches, folder: AnyPath) -> None:
    """Writes the resolved configuration and the tokenizer into the run folder."""
    tokenizer = load_tokenizer(data.splits["train"][0].folder).files
    present = read_many(folder, tokenizer)
    files = {name: content for name, content in tokenizer.items() if present[name] is None}
    write_many(folder, {"config.yaml": yaml_file.dump(config).encode(), **files})
