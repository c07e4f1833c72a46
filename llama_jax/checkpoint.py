"""Model folders and training checkpoints: the only importer of Orbax.

A model folder holds `weights/` (Orbax), `config.json` and the tokenizer. A run folder holds
`checkpoints/<step>/` with the items `model` and `optimizer`, where <step> is the number of steps
that have been done. Everything is written beside its place and renamed: what has a name is whole.
"""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp
from pydantic import TypeAdapter, ValidationError

from llama_jax import config_file
from llama_jax.config import CheckpointConfig, Config
from llama_jax.errors import InputError
from llama_jax.family import ModelConfig
from llama_jax.model.transformer import Llama

Tree = TypeVar("Tree")


def tree_to_dict(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a pytree in nested dicts, by plain names ('layers' -> 'wq')."""
    nested: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        *parents, last = _names(path)
        place = nested
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = leaf
    return nested


def dict_to_tree(like: Tree, nested: dict[str, Any]) -> Tree:
    """Returns the leaves in `nested` in the structure of `like`: `tree_to_dict` undone."""

    def leaf(path: tuple[Any, ...], _: Any) -> Any:
        found: Any = nested
        for name in _names(path):
            found = found[name]
        return found

    return jax.tree.map_with_path(leaf, like)


def _names(path: tuple[Any, ...]) -> list[str]:
    names = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path]
    # An nnx.Param is a node with one leaf, `value`: the weight's own name is enough.
    return names[:-1] if names[-1] == "value" else names


def abstract(make: Any, *args: Any) -> Any:
    """Returns the shapes, dtypes and shardings on the current mesh of what `make(*args)` makes."""
    mesh = jax.sharding.get_mesh()

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, jax.eval_shape(make, *args))


def abstract_model(config: ModelConfig) -> Llama:
    """Returns the shapes, dtypes and shardings of a model's weights on the current mesh."""
    return abstract(partial(Llama, config), jax.random.key(0))


class Progress(NamedTuple):
    """What a training checkpoint remembers beside weights and optimizer state."""

    step: int  # steps done; also the number of the next step
    data: list[str]  # fingerprint of the data


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
        raise _damaged(where, error) from error
    for item, tree in wanted.items():
        # Compared first, because Orbax would pad or cut an array of another shape.
        _check_shapes(where, item, (saved or {}).get(item), tree)
    try:
        return load(source, wanted)
    except Exception as error:
        raise _damaged(where, error) from error


def _damaged(where: Path, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0][:200] if str(error) else type(error).__name__
    return InputError(
        f"the checkpoint {where} is damaged or cut short: remove it (a run then goes on from an"
        f" earlier one) or write it again ({reason})"
    )


def _check_shapes(where: Path, item: str, saved: Any, wanted: dict[str, Any]) -> None:
    if saved is None:
        raise _damaged(where, KeyError(f"no {item} in it"))
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
    return ".".join(_names(path))


def save_model(
    folder: str | Path, config: ModelConfig, model: Llama, tokenizer: str | Path | None
) -> None:
    """Writes a model folder; it appears when it is whole, or not at all.

    Raises:
        InputError: `folder` is there already.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} is already there: remove it, or choose another folder")
    partial_folder = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    try:
        items = {"model": tree_to_dict(model)}
        ocp.save_checkpointables(str((partial_folder / "weights").absolute()), items)
        (partial_folder / "config.json").write_text(
            json.dumps(dataclasses.asdict(config), indent=1)
        )
        if tokenizer is not None:
            shutil.copyfile(tokenizer, partial_folder / "tokenizer.model")
        partial_folder.rename(folder)
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise


def is_run(folder: Path) -> bool:
    """Tells whether `folder` is a run folder (and not a model folder)."""
    return (folder / "config.yaml").is_file()


def read_model_config(folder: str | Path) -> ModelConfig:
    """Returns the shape of the model in a model folder or run folder.

    Raises:
        InputError: the folder is neither, or its configuration is damaged.
    """
    folder = Path(folder)
    if is_run(folder):
        return read_run_config(folder).model
    path = folder / "config.json"
    if not path.is_file():
        what = "is neither a run folder nor a model folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {what}: give one that has a config.yaml or a config.json")
    try:
        return TypeAdapter(ModelConfig).validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"]))
        raise InputError(
            f"{path} is not the configuration of a llama_jax model: {key} {problem['msg'].lower()}"
        ) from error


def read_run_config(folder: Path) -> Config:
    """Returns the configuration that a run was started with."""
    return config_file.load(folder / "config.yaml")


def load_model(
    folder: str | Path, config: ModelConfig | None = None, step: int | None = None
) -> tuple[ModelConfig, Llama]:
    """Returns a model from a model folder, or from a checkpoint of a run, on the current mesh.

    Args:
        folder: a model folder, or a run folder.
        config: how to compute it; default: as the folder says. Weights are cast to its
            `param_dtype`.
        step: checkpoint of a run; default: the newest.

    Raises:
        InputError: the folder holds no model, it is damaged, or it doesn't fit `config`.
    """
    folder = Path(folder)
    own_config = read_model_config(folder)
    config = config or own_config
    model = abstract_model(config)
    if is_run(folder):
        checkpoints = TrainingCheckpoints(folder / "checkpoints")
        if not checkpoints.steps:
            raise InputError(f"{folder} holds no checkpoint yet: let the run reach its first one")
        step = checkpoints.steps[-1] if step is None else step
        if step not in checkpoints.steps:
            raise InputError(f"{folder} holds no checkpoint {step}; it has {checkpoints.steps}")
        return config, checkpoints.restore_model(step, model)
    weights = folder / "weights"
    wanted = {"model": tree_to_dict(model)}
    loaded = _load_items(ocp.load_checkpointables, str(weights.absolute()), wanted, weights)
    return config, dict_to_tree(model, loaded["model"])
