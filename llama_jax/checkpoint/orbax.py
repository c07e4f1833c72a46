"""Model folders and training checkpoints: the only importer of Orbax.

A model folder holds `weights/` (Orbax), `config.json` and the tokenizer. A run folder holds
`checkpoints/<step>/` with the items `model` and `optimizer`, where <step> is the number of steps
that have been done. Everything is written beside its place and renamed: what has a name is whole.
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

CHUNK_BYTES = 1 << 24  # a device that needs a part of an array reads its chunks alone

_INCOMPLETE = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax has not finished


class Progress(NamedTuple):
    """What a training checkpoint remembers beside weights and optimizer state."""

    step: int  # steps done; also the number of the next step
    data: list[str]  # fingerprint of the data


def _by_layers() -> ocp.Context:
    """Returns a context in which arrays are stored in chunks, cut between layers first.

    So a reader of one layer, or of another mesh, need not read an array whole.
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
    """The checkpoints of a run, written in the background.

    With a `config`, old ones and what a killed process left half-written are removed; without,
    they are only read.

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
        """Starts to save; arrays may be donated as soon as this returns.

        Raises:
            Fault: this save, or the one before it, has failed.
        """
        self.wait()
        step = progress.step
        if step in self.steps:
            return
        with self._saving_failed(step), _by_layers():
            response = ocp.save_checkpointables_async(
                str(self.folder.absolute() / str(step)),
                {"model": tree_to_dict(model), "optimizer": tree_to_dict(opt_state)},
                custom_metadata={"data": [*progress.data]},
            )
        self._saving = step, self._thread.submit(self._finish, step, response)

    def check(self) -> None:
        """Raises the error of a save that has failed, as soon as it is known. Doesn't wait.

        Raises:
            Fault: the save has failed; the checkpoints before it are as they were.
        """
        if self._saving and self._saving[1].done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in the background, if any.

        Raises:
            Fault: as `check`.
        """
        saving, self._saving = self._saving, None
        if saving:
            with self._saving_failed(saving[0]):
                saving[1].result()

    def close(self) -> None:
        """Waits for the last save and ends the thread that saves.

        Raises:
            Fault: as `check`.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _finish(self, step: int, response: Any) -> None:
        """Waits until a checkpoint is complete on all hosts, then removes the superseded ones."""
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
                # A process that is killed meanwhile must not leave a folder that looks complete.
                removed = self.folder / f"{old}{_INCOMPLETE}-removed"
                with contextlib.suppress(FileNotFoundError):  # somebody has moved it
                    (self.folder / str(old)).rename(removed)
                    shutil.rmtree(removed)

    @contextlib.contextmanager
    def _saving_failed(self, step: int) -> Iterator[None]:
        try:
            yield
        except FAULTS as error:
            self._remove_incomplete()  # the space that it takes may be what is missing
            before = "there is no earlier checkpoint"
            if self.steps:
                numbers = ", ".join(map(str, self.steps))
                before = f"the checkpoints of steps {numbers} are as they were"
            raise Fault(
                f"can't save step {step} in {self.folder} ({root_cause(error)}): {before}; mend"
                " that, and the same command goes on from the last one"
            ) from error

    def _remove_incomplete(self) -> None:
        if jax.process_index() == 0:
            for path in self.folder.glob(f"*{_INCOMPLETE}*"):
                shutil.rmtree(path, ignore_errors=True)

    def restore(
        self, step: int, model: Llama, opt_state: optax.OptState
    ) -> tuple[Progress, Llama, optax.OptState]:
        """Returns what was saved at `step`, in the shardings of the abstract `model`, `opt_state`.

        Raises:
            InputError: the checkpoint is damaged, or was written by another shape of model.
            Fault: the machine could not read it.
        """
        where = self.folder / str(step)
        wanted = {"model": tree_to_dict(model), "optimizer": tree_to_dict(opt_state)}
        loaded = load_items(where, wanted)
        data = parse_json_file(
            where / "_CHECKPOINT_METADATA", lambda about: [*about["custom_metadata"]["data"]]
        )
        return (
            Progress(step, data),
            dict_to_tree(model, loaded["model"]),
            dict_to_tree(opt_state, loaded["optimizer"]),
        )

    def restore_model(self, step: int, model: Llama) -> Llama:
        """Returns the weights alone."""
        wanted = {"model": tree_to_dict(model)}
        return dict_to_tree(model, load_items(self.folder / str(step), wanted)["model"])


def weights_folder(folder: Path) -> Path:
    """Returns where the weights of a model folder, or of a run's newest checkpoint, lie.

    Raises:
        InputError: the run has no checkpoint yet.
    """
    if not is_run_folder(folder):
        return folder / "weights"
    steps = TrainingCheckpoints(folder / "checkpoints").steps
    if not steps:
        raise InputError(f"{folder} holds no checkpoint yet: let the run reach its first one")
    return folder / "checkpoints" / str(steps[-1])


def write_skeleton(folder: Path, dotted: list[str]) -> Path:
    """Writes a checkpoint of one number for each dotted name into `folder`/weights.

    Each array has a folder of its own below the path that is returned, to be replaced by the real
    one: so that an array may be written piece by piece, and Orbax reads it like any other.
    """
    tree: dict[str, Any] = {}
    for name in dotted:
        *parents, last = name.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = np.zeros(())
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
    """Writes a model folder; it appears when it is complete, or not at all.

    On several hosts all call this: each writes its part of the weights into the same folder, which
    lies on shared storage, and host 0 makes the folder and writes the other files.

    >>> lj.save_model("models/mine", config, model, tokenizer)
    >>> lj.load("models/mine")[0] == config
    True

    Raises:
        InputError: `folder` is there already, or another process is writing it.
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
            apart = weights["layers"].values()
            weights["layers"] = jax.tree.map(lambda *layers: jnp.stack(layers), *apart)
        else:
            weights = tree_to_dict(model)
        items = {"model": weights}
        with _by_layers():
            ocp.save_checkpointables(str(partial_folder / "weights"), items)
        if hosts.is_host_zero():
            (partial_folder / "config.json").write_text(
                json.dumps(dataclasses.asdict(config), indent=1)
            )
            for name, content in (tokenizer.files if tokenizer else {}).items():
                (partial_folder / name).write_bytes(content)
    hosts.broadcast_decision(lambda: None)  # host 0 has renamed it


def load_model(
    folder: str | Path,
    config: ModelConfig | None = None,
    like: Llama | None = None,
) -> tuple[ModelConfig, Llama]:
    """Returns a model from a model folder, or from a run's newest checkpoint, on the current mesh.

    Args:
        folder: a model folder, or a run folder.
        config: how to compute it; default: as the folder says. Weights are cast to its
            `param_dtype`.
        like: shapes, dtypes and shardings of the weights; default: those of `config`.

    Raises:
        InputError: the folder holds no model, it is damaged, or it doesn't fit `config`.
    """
    folder = Path(folder)
    own_config = read_model_config(folder)
    config = config or own_config
    if config.quantized != own_config.quantized:
        raise InputError(
            f"model.quantized is {config.quantized}, but the weights in {folder} are kept as"
            f" {own_config.quantized}: give the folder that it was made from"
        )
    model = like or abstract_model(config)
    loaded = load_items(weights_folder(folder), {"model": tree_to_dict(model)})
    return config, dict_to_tree(model, loaded["model"])
