"""The low-rank pairs of a LoRA run, read on demand, and the base that they belong to."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax.checkpoint import folders
from llama_jax.checkpoint.model_folders import manifest_hash, weights_location
from llama_jax.checkpoint.single_weights import WeightsReader
from llama_jax.checkpoint.tree import eval_shape_on_mesh
from llama_jax.config.lora import IN_OUT_DIMS, LoraConfig
from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.model.lora import Adapters
from llama_jax.model.summary import path_names
from llama_jax.parallel.head_copies import with_copies
from llama_jax.runtime.manifest import verified_manifest
from llama_jax.runtime.storage import AnyPath, parse_path


class Pair(NamedTuple):
    """A low-rank pair of one layer: a [in…, R] and b [R, out…], float32."""

    a: np.ndarray
    b: np.ndarray


class StoredPairs(NamedTuple):
    """The low-rank pairs in a folder, read one at a time.

    Attributes:
        folder: a LoRA run, or a folder of PEFT.
        lora: rank, alpha and targets.
        base: of a run, the hash in the manifest of its base; None for PEFT's.
        read: returns the pair of a weight, by the weight's name and its layer.
    """

    folder: AnyPath
    lora: LoraConfig
    base: str | None
    read: Callable[[str, int], Pair]


def pair_shapes(
    config: ModelConfig, lora: LoraConfig, name: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of a and b of one layer."""
    inputs, outputs = (config.shape(letters) for letters in IN_OUT_DIMS[name])
    return (*inputs, lora.rank), (lora.rank, *outputs)


def base_of_run(folder: AnyPath) -> AnyPath:
    """Returns the model beside which the pairs of a LoRA run were trained.

    Raises:
        Damaged: the checkpoint or the model is damaged.
        InputError: the run has no checkpoint yet, or the model is missing or another one.
    """
    base = parse_path(str(folders.read_run_config(folder).training.init_from))
    if not base.exists():
        raise InputError(
            f"{folder} is a LoRA run, and the model that it started from, {base}, is not there:"
            " put it back, or give it together with --lora"
        )
    check_base(folder, base, stored_base(folder))
    return base


def check_base(folder: AnyPath, base: AnyPath, expected: str | None) -> None:
    """Compares a model with the one beside which the pairs in a folder were trained.

    A checkpoint of another format has no manifest, so it is not compared.

    Args:
        folder: of the pairs.
        base: the model.
        expected: hash in the manifest of the model beside which the pairs were trained.

    Raises:
        Damaged: the model is damaged.
        InputError: it is another one.
    """
    if folders.checkpoint_format(base) != "orbax":
        return
    if expected != manifest_hash(base):
        raise InputError(
            f"the weights in {base} are not those beside which the pairs of {folder} were trained"
            " (their manifests differ): give the model that the run started from"
        )


def stored_base(folder: AnyPath) -> str | None:
    """Returns the hash of the base's manifest, which the newest checkpoint of a run contains."""
    where, _ = weights_location(folder)
    return verified_manifest(where).get("base")


def read_lora_run(folder: AnyPath, config: ModelConfig) -> StoredPairs:
    """Returns the low-rank pairs of a LoRA run's newest checkpoint.

    Args:
        folder: the run folder.
        config: of the base.

    Raises:
        Damaged: the checkpoint is damaged.
        InputError: the run has no checkpoint yet, or its pairs don't fit the base.
    """
    run = folders.read_run_config(folder)
    lora = run.lora
    assert lora
    for key in run.model.differences(config):
        ours, other = getattr(run.model, key), getattr(config, key)
        if key not in ("quantized", "context"):  # Meta's format doesn't store the context
            raise InputError(
                f"the pairs of {folder} were trained with model.{key} {ours}, but the base has"
                f" {other}: give the run without --lora, or its own base"
            )
    reader = WeightsReader(folder)
    for name in lora.targets:
        for side, shape in zip("ab", pair_shapes(config, lora, name), strict=True):
            found = reader.arrays.get(f"layers.{name}.{side}", ((), None))[0]
            if found != (config.n_layers, *shape):
                raise InputError(
                    f"{reader.folder}: the pair of {name} has {side} {found or 'absent'}, but"
                    f" {folder / 'config.yaml'} and the base require {(config.n_layers, *shape)}:"
                    " restore the configuration, or give the model that the run started from"
                )

    def read(name: str, layer: int) -> Pair:
        a, b = (reader.read(f"layers.{name}.{side}", layer) for side in "ab")
        return Pair(a, b)

    return StoredPairs(folder, lora, stored_base(folder), read)


def load_adapters(config: ModelConfig, pairs: StoredPairs) -> Adapters:
    """Returns the pairs on the current mesh, layers stacked.

    If several devices have a copy of each key/value head, the head is repeated, as in `load`.
    """

    def leaf(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> jax.Array:
        _, name, side = path_names(path)
        layers = [getattr(pairs.read(name, i), side) for i in range(config.n_layers)]
        array_L = np.stack(layers)
        if array_L.shape != like.shape:
            array_L = np.repeat(array_L, like.size // array_L.size, axis=-2)
        return jax.make_array_from_callback(like.shape, like.sharding, array_L.__getitem__)

    init = partial(Adapters, with_copies(config), pairs.lora)
    like = eval_shape_on_mesh(init, jax.random.key(0))
    return jax.tree.map_with_path(leaf, like)
