"""Saves and loads model folders and training checkpoints: the only importer of Orbax.

A model folder contains `weights/` (Orbax), `config.json` and the tokenizer. A run folder contains
`checkpoints/<step>/` with the items `model` and `optimizer`, where <step> is the number of
completed steps. Every folder is written under a temporary name and renamed: a folder under its
final name is complete.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp

from llama_jax.checkpoint.arrays import FAULTS, load_items, parse_json_file, root_cause
from llama_jax.checkpoint.folders import is_run_folder, read_model_config
from llama_jax.checkpoint.tree import abstract_model, dict_to_tree, tree_to_dict
from llama_jax.config.model import ModelConfig
from llama_jax.config.run import CheckpointConfig
from llama_jax.errors import Fault, InputError
from llama_jax.model.weights import Llama, UnstackedLlama, restore_layout
from llama_jax.runtime import hosts
from llama_jax.runtime.atomic_write import new_folder
from llama_jax.runtime.storage import check_local
from llama_jax.tokenizer.tokenizer import Tokenizer

CHUNK_BYTES = 1 << 24  # a device that needs a part of an array reads only its chunks

_INCOMPLETE = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax has not completed


class Progress(NamedTuple):
    """The metadata of a training checkpoint."""

    step: int  # completed steps; also the number of the next step
    data: list[str]  # fingerprint of the data


def _chunk_by_layer() -> ocp.Context:
    """Returns a context in which arrays are stored in chunks, split between layers first.

    So a reader of one layer, or a reader on another mesh, need not read complete arrays.
    """
    chunked: Any = ocp.options.ArrayOptions.Saving.StorageOptions(
        chunk_byte_size=CHUNK_BYTES, shard_axes=(0,)
    )
    context = ocp.Context()

    def options(key: Any, value: Any) -> Any:
        return chunked if value.ndim else None

    context.array.saving.scoped_storage_options_creator = options
    return context


class TrainingCheckpoints:
    """The checkpoints of a run, saved in the background.

    With a `config`, superseded checkpoints and the incomplete ones of a killed process are removed;
    without, the checkpoints are only read.

    Attributes:
        steps: the steps of all complete checkpoints, ascending.
    """

    def __init__(self, folder: Path, config: CheckpointConfig | None = None):
        self.folder, self._config = folder, config
        if config:
            self._remove_incomplete()
        found = folder.iterdir() if folder.is_dir() else ()
        self.steps = sorted(int(path.name) for path in found if path.name.isdecimal())
        self._thread = ThreadPoolExecutor(1, "save")
        self._saving: tuple[int, Future[None]] | None = None

    def save(self, progress: Progress, model: Llama, opt_state: optax.OptState) -> None:
        """Starts to save in the background; the arrays may be donated as soon as this returns.

        Raises:
            Fault: this save, or the previous one, failed.
        """
        self.wait()
        step = progress.step
        if step in self.steps:
            return
        with self._explain_failure(step), _chunk_by_layer():
            response = ocp.save_checkpointables_async(
                str(self.folder.absolute() / str(step)),
                {"model": tree_to_dict(model), "optimizer": tree_to_dict(opt_state)},
                custom_metadata={"data": [*progress.data]},
            )
        self._saving = step, self._thread.submit(self._finish, step, response)

    def check(self) -> None:
        """Raises the error of the last save if it has failed. Doesn't wait for a save.

        Raises:
            Fault: the save failed; earlier checkpoints are unchanged.
        """
        if self._saving and self._saving[1].done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in the background, if there is one.

        Raises:
            Fault: as `check`.
        """
        saving, self._saving = self._saving, None
        if saving:
            with self._explain_failure(saving[0]):
                saving[1].result()

    def close(self) -> None:
        """Waits for the last save and ends the background thread.

        Raises:
            Fault: as `check`.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _finish(self, step: int, response: Any) -> None:
        """Waits until a checkpoint is complete on all hosts, then removes superseded ones."""
        response.result()
        self.steps.append(step)
        config = self._config
        if config is None:
            return
        for old in self.steps[: -config.keep]:
            if config.keep_every and old % config.keep_every == 0:
                continue
            self.steps.remove(old)
            if jax.process_index() == 0:
                # Rename first: if the process is killed during the removal, the partly removed
                # folder doesn't have the name of a complete one.
                removed = self.folder / f"{old}{_INCOMPLETE}-removed"
                with contextlib.suppress(FileNotFoundError):  # a user has moved the folder
                    (self.folder / str(old)).rename(removed)
                    shutil.rmtree(removed)

    @contextlib.contextmanager
    def _explain_failure(self, step: int) -> Iterator[None]:
        """Replaces an error of saving by a Fault that also names the remaining checkpoints."""
        try:
            yield
        except FAULTS as error:
            self._remove_incomplete()  # frees its space: the disk may be full
            remaining = "there is no earlier checkpoint"
            if self.steps:
                numbers = ", ".join(map(str, self.steps))
                remaining = f"the checkpoints of steps {numbers} are unchanged"
            raise Fault(
                f"can't save step {step} in {self.folder} ({root_cause(error)}): {remaining}; fix"
                " the cause and repeat the command, which resumes from the last checkpoint"
            ) from error

    def _remove_incomplete(self) -> None:
        if jax.process_index() == 0:
            for path in self.folder.glob(f"*{_INCOMPLETE}*"):
                shutil.rmtree(path, ignore_errors=True)

    def restore(
        self, step: int, model: Llama, opt_state: optax.OptState
    ) -> tuple[Progress, Llama, optax.OptState]:
        """Returns the state saved at `step`, with the shardings of abstract `model`, `opt_state`.

        Raises:
            InputError: the checkpoint is damaged, or of a model with other shapes.
            Fault: the machine could not read it.
        """
        where = self.folder / str(step)
        wanted = {"model": tree_to_dict(model), "optimizer": tree_to_dict(opt_state)}
        loaded = load_items(where, wanted)
        data = parse_json_file(
            where / "_CHECKPOINT_METADATA", lambda metadata: [*metadata["custom_metadata"]["data"]]
        )
        return (
            Progress(step, data),
            dict_to_tree(model, loaded["model"]),
            dict_to_tree(opt_state, loaded["optimizer"]),
        )

    def restore_model(self, step: int, model: Llama) -> Llama:
        """Returns the weights saved at `step`, without the optimizer state."""
        wanted = {"model": tree_to_dict(model)}
        return dict_to_tree(model, load_items(self.folder / str(step), wanted)["model"])


def weights_folder(folder: Path) -> Path:
    """Returns the folder with the weights of a model folder or of a run's newest checkpoint.

    Raises:
        InputError: the run has no checkpoint yet.
    """
    if not is_run_folder(folder):
        return folder / "weights"
    steps = TrainingCheckpoints(folder / "checkpoints").steps
    if not steps:
        raise InputError(f"{folder} has no checkpoint yet: let the run reach its first one")
    return folder / "checkpoints" / str(steps[-1])


def write_placeholders(folder: Path, names: list[str]) -> Path:
    """Writes a checkpoint of one scalar for each dotted name into `folder`/weights.

    The caller replaces the folder of each array, below the returned path, by the real array. So it
    can write an array slice by slice, and Orbax reads the result like its own.
    """
    tree: dict[str, Any] = {}
    for name in names:
        *parents, last = name.split(".")
        subtree = tree
        for parent in parents:
            subtree = subtree.setdefault(parent, {})
        subtree[last] = np.zeros(())
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = False
    saving.array_metadata_store = None
    saving.enable_write_sharding_file = False
    with context:
        ocp.save_checkpointables(str((folder / "weights").absolute()), {"model": tree})
    return folder / "weights" / "model"


def save_model(
    folder: str | Path,
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    tokenizer: Tokenizer | None,
) -> None:
    """Writes a model folder, which appears once it is complete, or not at all.

    On several hosts all hosts must call this: each writes its shards of the weights into the same
    folder on shared storage, and host 0 creates the folder and writes the other files.

    >>> lj.save_model("models/mine", config, model, tokenizer)
    >>> lj.load("models/mine")[0] == config
    True

    Raises:
        InputError: `folder` already exists, or another process is writing it.
        Fault: the system can't write it.
    """
    folder = Path(check_local(str(folder)))
    with contextlib.ExitStack() as stack:
        partial_folder = Path(
            hosts.broadcast_decision(
                lambda: str(stack.enter_context(new_folder(folder)).absolute())
            )
        )
        if isinstance(model, UnstackedLlama):
            weights = tree_to_dict(restore_layout(model))
            layers = weights["layers"].values()
            weights["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        else:
            weights = tree_to_dict(model)
        items = {"model": weights}
        with _chunk_by_layer():
            ocp.save_checkpointables(str(partial_folder / "weights"), items)
        if hosts.is_host_zero():
            (partial_folder / "config.json").write_text(
                json.dumps(dataclasses.asdict(config), indent=1)
            )
            for name, content in (tokenizer.files if tokenizer else {}).items():
                (partial_folder / name).write_bytes(content)
    hosts.broadcast_decision(lambda: None)  # all hosts return after host 0 has renamed the folder


def load_model(
    folder: str | Path,
    config: ModelConfig | None = None,
    like: Llama | None = None,
) -> tuple[ModelConfig, Llama]:
    """Returns a model from a model folder, or from a run's newest checkpoint, on the current mesh.

    Args:
        folder: a model folder, or a run folder.
        config: how to compute; default: the folder's configuration. Weights are cast to its
            `param_dtype`.
        like: shapes, dtypes and shardings of the weights; default: those of `config`.

    Raises:
        InputError: the folder contains no model, is damaged, or doesn't fit `config`.
    """
    folder = Path(folder)
    own_config = read_model_config(folder)
    config = config or own_config
    if config.quantized != own_config.quantized:
        raise InputError(
            f"model.quantized is {config.quantized}, but the weights in {folder} are stored as"
            f" {own_config.quantized}: give the folder from which it was converted"
        )
    model = like or abstract_model(config)
    loaded = load_items(weights_folder(folder), {"model": tree_to_dict(model)})
    return config, dict_to_tree(model, loaded["model"])
