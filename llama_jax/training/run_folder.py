"""The folder of a run: whose it is, what it was started with, what it must not forget."""

import contextlib
import dataclasses
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_jax.checkpoint import folders
from llama_jax.config import yaml_file
from llama_jax.config.run import Config
from llama_jax.data.batches import Batches
from llama_jax.errors import InputError
from llama_jax.runtime import hosts
from llama_jax.runtime.atomic_write import replace_file
from llama_jax.runtime.console import print_status
from llama_jax.tokenizer.tokenizer import load_tokenizer

# A resumed run must be the run that it was. These keys may change, and the change is told.
CHANGEABLE = ("model.remat", "model.scan", "mesh", "data.mixture", "data.corpus", "data.tokenizer")
CHANGEABLE += ("data.validation_fraction", "training.out", "training.steps")
CHANGEABLE += ("training.micro_batches", "training.max_skipped", "training.eval_every")
CHANGEABLE += ("training.init_from",)  # it is read while there is no checkpoint
CHANGEABLE += ("training.eval_batches", "checkpoint", "logging")

VISIBLE_SECONDS = 60.0  # after which any network file system shows what another host wrote


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Makes the run folder and keeps other runs out of it while this one goes on.

    Raises:
        InputError: another run is in it, it can't be written, or it isn't there on all hosts.
    """
    with contextlib.ExitStack() as held:
        mark = hosts.broadcast_decision(lambda: _lock(folder, held))
        _check_shared(folder, mark)
        yield


def _lock(folder: Path, held: contextlib.ExitStack) -> str:
    """Locks the folder as long as `held` is open; returns what now stands in the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")  # noqa: SIM115 (closed with `held`)
    except OSError as error:
        raise InputError(f"can't write the run folder {folder}: {error.strerror}") from error
    held.enter_context(lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(
            f"another process is training in {folder}: wait for it, or choose another training.out"
        ) from error
    mark = os.urandom(8).hex()
    lock.truncate(0)
    lock.write(mark)
    lock.flush()
    os.fsync(lock.fileno())
    return mark


def _check_shared(folder: Path, mark: str) -> None:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (folder / ".lock").is_file() or (folder / ".lock").read_text() != mark:
        if time.monotonic() > deadline:
            raise InputError(
                f"the run folder {folder.absolute()} is not that of host 0: training.out must lie"
                " on storage that all hosts share, under the same name"
            )
        time.sleep(0.2)


def check_unchanged(config: Config, folder: Path) -> None:
    """Refuses to resume with another configuration, and tells of harmless changes."""
    before = dict(flat(dataclasses.asdict(folders.read_run_config(folder))))
    for name, value in flat(dataclasses.asdict(config)):
        old = before.get(name)
        if value == old:
            continue
        if any(name == key or name.startswith(key + ".") for key in CHANGEABLE):
            print_status(f"{folder}: {name} changes from {old} to {value}")
        else:
            raise InputError(
                f"{folder} was trained with {name} = {old}, and now it is {value}: change it back"
                " to resume, or choose another training.out"
            )


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the keys of a configuration, as 'section.key', and their values."""
    for name, value in values.items():
        if isinstance(value, dict) and prefix + name != "data.mixture":
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def write_run_files(config: Config, data: Batches, folder: Path) -> None:
    """Leaves the resolved configuration and the tokenizer in the run folder."""
    with replace_file(folder / "config.yaml") as partial:
        partial.write_text(yaml_file.dump(config))
    for name, content in load_tokenizer(data.splits["train"][0].folder).files.items():
        if not (folder / name).exists():
            with replace_file(folder / name) as partial:
                partial.write_bytes(content)
