"""The folder of a run: its configuration and its tokenizer."""

from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter

from llama_jax.checkpoint import folders
from llama_jax.config import yaml_file
from llama_jax.config.run import Config
from llama_jax.data.batches import Batches
from llama_jax.errors import InputError
from llama_jax.runtime.console import print_status
from llama_jax.runtime.storage import AnyPath, read_many, write_many
from llama_jax.tokenizer.tokenizer import load_tokenizer
from llama_jax.training.events import record_events

# A resumed run must continue the same run. Only these keys may change; the change is printed.
CHANGEABLE = ("model.remat", "model.scan", "mesh", "data.mixture", "data.corpus", "data.tokenizer")
CHANGEABLE += ("data.phases", "data.validation_fraction", "training.out", "training.steps")
CHANGEABLE += ("training.micro_batches", "training.max_skipped", "training.eval_every")
CHANGEABLE += ("training.init_from",)  # used only before the first checkpoint
CHANGEABLE += ("training.eval_batches", "training.evaluate", "training.profile", "checkpoint")
CHANGEABLE += ("training.watchdog", "training.check_every")
CHANGEABLE += ("training.on_spike", "training.spike_threshold")
CHANGEABLE += ("logging",)
# The learning rate of the remaining steps; `schedule_change` prints the consequence.
CHANGEABLE += ("optimizer.schedule", "optimizer.decay_steps", "optimizer.final_lr_fraction")


def check_unchanged(config: Config, folder: AnyPath) -> Config:
    """Compares the configuration with that of the run, and prints the allowed changes.

    Returns:
        The configuration of the run until now.

    Raises:
        InputError: a key outside of `CHANGEABLE` has changed.
    """
    previous = folders.read_run_config(folder)
    for name, old, value in _list_changes(previous, config):
        if any(name == key or name.startswith(key + ".") for key in CHANGEABLE):
            print_status(f"{folder}: {name} changes from {old} to {value}")
        else:
            raise InputError(
                f"{folder} was trained with {name} = {old}, and now it is {value}: change it back"
                " to resume, or choose another training.out"
            )
    return previous


def _list_changes(previous: Config, config: Config) -> Iterator[tuple[str, Any, Any]]:
    """Yields each key whose value differs, with the previous value and the new one."""
    old, new = (dict(flatten(TypeAdapter(Config).dump_python(c))) for c in (previous, config))
    for name in {**new, **old}:  # a section that is null has no keys
        if new.get(name) != old.get(name):
            yield name, old.get(name), new.get(name)


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the keys of a configuration, as 'section.key', with their values."""
    for name, value in values.items():
        if isinstance(value, dict) and prefix != "data.":  # its maps are values
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def write_run_files(config: Config, data: Batches, folder: AnyPath, step: int) -> None:
    """Writes the resolved configuration and the tokenizer into the run folder.

    If the run resumes, each key that changes is recorded in events.jsonl first.

    Args:
        config: of the run, from now on.
        data: of the run.
        folder: of the run.
        step: number of steps done.
    """
    if step:
        _record_changes(config, folder, step)
    tokenizer = load_tokenizer(data.splits["train"][0].folder).files
    present = read_many(folder, tokenizer)
    files = {name: content for name, content in tokenizer.items() if present[name] is None}
    write_many(folder, {"config.yaml": yaml_file.dump(config).encode(), **files})


def _record_changes(config: Config, folder: AnyPath, step: int) -> None:
    changes = list(_list_changes(folders.read_run_config(folder), config))
    if not changes:
        return
    record_events(
        folder,
        [
            {"step": step, "event": "changed", "key": name, "from": old, "to": value}
            for name, old, value in changes
        ],
    )
