"""Model folders and training checkpoints: the only importer of Orbax.

A model folder holds `weights/` (Orbax), `config.json` and the tokenizer. A run folder holds
`checkpoints/<step>/` with the items `model` and `optimizer`, where <step> is the number of steps
that have been done. Everything is written beside its place and renamed: what has a name is whole.
"""

import contextlib
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp

from llama_jax import hosts
from llama_jax.atomic_write import new_folder
from llama_jax.config import CheckpointConfig
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.errors import InputError
from llama_jax.family import ModelConfig
from llama_jax.folders import is_run, read_model_config
from llama_jax.model.transformer import Llama, Unrolled, as_stored
from llama_jax.model.weights import names
from llama_jax.regular_file import check_regular
from llama_jax.tree import abstract_model, dict_to_tree, tree_to_dict

CHUNK_BYTES = 1 << 24  # a device that needs a part of an array reads its chunks alone


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
    """

    def __init__(self, folder: Path, config: CheckpointConfig | None = None):
        policies: Any = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(config.keep if config else None)]
        if config and config.keep_every:
            kept.append(policies.EveryNSteps(config.keep_every))
        self.folder = folder
        self._checkpointer = ocp.training.Checkpointer(
            str(folder.absolute()),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=config is not None,
        )

    @property
    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def save(self, progress: Progress, model: Llama, opt_state: optax.OptState) -> None:
        """Starts to save; arrays may be donated as soon as this returns.

        An error of the save before this one is raised here.
        """
        if progress.step in self.steps:
            return
        with _by_layers():
            self._checkpointer.save_checkpointables_async(
                progress.step,
                {"model": tree_to_dict(model), "optimizer": tree_to_dict(opt_state)},
                custom_metadata={"data": [*progress.data]},
                force=True,
            )

    def restore(
        self, step: int, model: Llama, opt_state: optax.OptState
    ) -> tuple[Progress, Llama, optax.OptState]:
        """Returns what was saved at `step`, in the shardings of the abstract `model`, `opt_state`.

        Raises:
            InputError: the checkpoint is damaged, or was written by another shape of model.
        """
        wanted = {"model": tree_to_dict(model), "optimizer": tree_to_dict(opt_state)}
        loaded = self._load(step, wanted)
        metadata: Any = self._checkpointer.metadata(step).custom_metadata
        progress = Progress(step, metadata["data"])
        return (
            progress,
            dict_to_tree(model, loaded["model"]),
            dict_to_tree(opt_state, loaded["optimizer"]),
        )

    def restore_model(self, step: int, model: Llama) -> Llama:
        """Returns the weights alone."""
        return dict_to_tree(model, self._load(step, {"model": tree_to_dict(model)})["model"])

    def _load(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        where = self.folder / str(step)
        return _load_items(self._checkpointer.load_checkpointables, step, wanted, where)

    def close(self) -> None:
        """Waits for the last save and raises its error, if any."""
        self._checkpointer.close()


def _load_items(load: Any, source: Any, wanted: dict[str, Any], where: Path) -> dict[str, Any]:
    """Loads the items `wanted` of the Orbax checkpoint `where`, whose names and shapes must fit."""
    try:
        saved = ocp.checkpointables_metadata(str(where.absolute())).metadata
    except Exception as error:  # Orbax and TensorStore raise dozens of types for damaged files
        raise damaged(where, error) from error
    for item, tree in wanted.items():
        # Compared first, because Orbax would pad or cut an array of another shape.
        _check_shapes(where, item, (saved or {}).get(item), tree)
    problem: InputError
    with _silent_orphans():
        try:
            return load(source, wanted)
        except Exception as error:
            problem = damaged(where, error)
        # Raised out of reach of Orbax's own error, whose frames keep the orphans alive; some still
        # wait for their bytes.
        time.sleep(0.2)
        gc.collect()
    raise problem


@contextlib.contextmanager
def _silent_orphans() -> Iterator[None]:
    """Keeps Python from reporting the reads that Orbax leaves half-done when another one fails.

    It does so when they end or are collected, with pages of text for each weight.
    """
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before


def damaged(where: Path, error: Exception) -> InputError:
    """Returns the error for a checkpoint whose files can't be read."""
    reason = str(error).strip().splitlines()[0][:200] if str(error) else type(error).__name__
    return InputError(
        f"the checkpoint {where} is damaged or cut short: remove it (a run then goes on from an"
        f" earlier one) or write it again ({reason})"
    )


def _check_shapes(where: Path, item: str, saved: Any, wanted: dict[str, Any]) -> None:
    if saved is None:
        raise damaged(where, KeyError(f"no {item} in it"))
    has = {_dotted(path): tuple(leaf.shape) for path, leaf in jax.tree.leaves_with_path(saved)}
    wants = {_dotted(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(wanted)}
    for name in sorted(has.keys() | wants.keys()):
        if has.get(name) != wants.get(name):
            raise InputError(
                f"the checkpoint {where} was written with another model configuration: it holds"
                f" {item}.{name} as {has.get(name, 'nothing')}, but the configuration says"
                f" {wants.get(name, 'nothing')}"
            )


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(names(path))


class Item(NamedTuple):
    """The arrays in a checkpoint's `model` item, and how they are stored."""

    names: list[str]  # dotted
    ocdbt: bool
    zarr3: bool


def open_item(folder: Path) -> tuple[Path, Item]:
    """Returns where the weights of a model folder, or of a run's newest checkpoint, lie, and how.

    Raises:
        InputError: there are none, or they are damaged.
    """
    place = folder / "weights"
    if is_run(folder):
        steps = TrainingCheckpoints(folder / "checkpoints").steps
        if not steps:
            raise _no_checkpoint(folder)
        place = folder / "checkpoints" / str(steps[-1])
    check_regular(place)
    try:
        about = json.loads((place / "model" / "_METADATA").read_text())
        keys = [entry["key_metadata"] for entry in about["tree_metadata"].values()]
        dotted = [".".join(part["key"] for part in parts) for parts in keys]
        return place / "model", Item(dotted, about["use_ocdbt"], about["use_zarr3"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(place, error) from error


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


def _no_checkpoint(folder: Path) -> InputError:
    return InputError(f"{folder} holds no checkpoint yet: let the run reach its first one")


def save_model(
    folder: str | Path, config: ModelConfig, model: Llama | Unrolled, tokenizer: Tokenizer | None
) -> None:
    """Writes a model folder; it appears when it is complete, or not at all.

    On several hosts all call this: each writes its part of the weights into the same folder, which
    lies on shared storage, and host 0 makes the folder and writes the other files.

    >>> lj.save_model("models/mine", config, model, tokenizer)
    >>> lj.load("models/mine")[0] == config
    True

    Raises:
        InputError: `folder` is there already, or another process is writing it.
        WriteError: the system can't write it.
    """
    with contextlib.ExitStack() as stack:
        partial_folder = Path(
            hosts.decided(lambda: str(stack.enter_context(new_folder(folder)).absolute()))
        )
        if isinstance(model, Unrolled):
            weights = tree_to_dict(as_stored(model))
            apart = weights["layers"].values()
            weights["layers"] = jax.tree.map(lambda *layers: jnp.stack(layers), *apart)
        else:
            weights = tree_to_dict(model)
        items = {"model": weights}
        with _by_layers():
            ocp.save_checkpointables(str(partial_folder / "weights"), items)
        if hosts.leads():
            (partial_folder / "config.json").write_text(
                json.dumps(dataclasses.asdict(config), indent=1)
            )
            for name, content in (tokenizer.files if tokenizer else {}).items():
                (partial_folder / name).write_bytes(content)
    hosts.decided(lambda: None)  # host 0 has renamed it


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
    if is_run(folder):
        checkpoints = TrainingCheckpoints(folder / "checkpoints")
        if not checkpoints.steps:
            raise _no_checkpoint(folder)
        return config, checkpoints.restore_model(checkpoints.steps[-1], model)
    weights = folder / "weights"
    check_regular(weights)
    wanted = {"model": tree_to_dict(model)}
    loaded = _load_items(ocp.load_checkpointables, str(weights.absolute()), wanted, weights)
    return config, dict_to_tree(model, loaded["model"])
