"""The folder of a run: its lock, its configuration and its tokenizer."""

import contextlib
import dataclasses
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from llama_jax.checkpoint import folders
from llama_jax.config import yaml_file
from llama_jax.config.run import Config
from llama_jax.data.batches import Batches
from llama_jax.errors import Fault, InputError
from llama_jax.runtime import hosts
from llama_jax.runtime.bucket_path import BucketPath
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

VISIBLE_SECONDS = 60.0  # in this time any network file system shows the writes of another host


@contextlib.contextmanager
def lock_run_folder(folder: AnyPath) -> Iterator[Callable[[], None]]:
    """Creates the run folder, and locks it against other runs during the block.

    Object stores have no locks. There the newest run owns the folder: it writes its mark, and an
    older one (whose host was cut off, and taken for dead) stops before its next checkpoint.

    Yields:
        A function that raises `Fault` once another run owns the folder.

    Raises:
        InputError: another run has locked it, it can't be written, or hosts don't share it.
    """
    with contextlib.ExitStack() as opened:
        mark = hosts.broadcast_decision(lambda: _lock(folder, opened))
        _check_shared(folder, mark)

        def check_owner() -> None:
            if isinstance(folder, BucketPath) and (folder / ".lock").read_text() != mark:
                raise Fault(f"another run has taken over {folder}: this one stops")

        yield check_owner


def _lock(folder: AnyPath, opened: contextlib.ExitStack) -> str:
    """Locks the folder until `opened` closes; returns the random mark in the lock file."""
    mark = os.urandom(8).hex()
    if isinstance(folder, BucketPath):
        try:
            (folder / ".lock").write_text(mark)
        except OSError as error:
            raise Fault(f"can't write the run folder {folder}: {error.strerror}") from error
        return mark
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")  # noqa: SIM115 (`opened` closes it)
    except OSError as error:
        raise InputError(f"can't write the run folder {folder}: {error.strerror}") from error
    opened.enter_context(lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(
            f"another process is training in {folder}: wait for it, or choose another training.out"
        ) from error
    lock.truncate(0)
    lock.write(mark)
    lock.flush()
    os.fsync(lock.fileno())
    return mark


def _check_shared(folder: AnyPath, mark: str) -> None:
    """Waits until the lock file on this host contains the `mark` that host 0 wrote."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while read_many(folder, [".lock"])[".lock"] != mark.encode():
        if time.monotonic() > deadline:
            raise InputError(
                f"the run folder {folder.absolute()} is not that of host 0: training.out must be on"
                " storage that all hosts share, with the same path on all"
            )
        time.sleep(0.2)


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
