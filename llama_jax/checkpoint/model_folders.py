"""Saves and loads model folders; loads the weights of a run.

A model folder contains `weights/` (in Orbax's format), `config.json`, the tokenizer, and
`manifest.json`, which is written last.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.checkpoint import array_files
from llama_jax.checkpoint.arrays import load_items
from llama_jax.checkpoint.content_sums import complete_sums
from llama_jax.checkpoint.folders import (
    committed_steps,
    is_lora_run,
    is_run_folder,
    read_model_config,
)
from llama_jax.checkpoint.tree import abstract_model, dict_to_tree, tree_to_dict
from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.model.weights import Llama, UnstackedLlama, restore_layout
from llama_jax.runtime import hosts
from llama_jax.runtime.atomic_write import new_folder
from llama_jax.runtime.manifest import hash_bytes, verified_manifest, write_manifest
from llama_jax.runtime.storage import AnyPath, parse_path, write_many
from llama_jax.tokenizer.tokenizer import Tokenizer


class WeightFiles(NamedTuple):
    """The files of stored weights.

    Attributes:
        names: relative to the folder of the weights, without the chunks of arrays.
        sums: the content sum of each array.
    """

    names: list[str]
    sums: dict[str, str]


def weights_location(folder: AnyPath) -> tuple[AnyPath, WeightFiles]:
    """Returns the checkpoint of a model folder, or a run's newest one, and its files.

    Raises:
        Damaged: its files are not those that were written.
        InputError: the run has no checkpoint yet.
    """
    if not is_run_folder(folder):
        found = verified_manifest(folder)
        names = [n.removeprefix("weights/") for n in found["files"] if n.startswith("weights/")]
        return folder / "weights", WeightFiles(names, found.get("sums", {}))
    steps, _ = committed_steps(folder / "checkpoints")
    if not steps:
        raise InputError(f"{folder} has no checkpoint yet: let the run reach its first one")
    where = folder / "checkpoints" / str(steps[-1])
    found = verified_manifest(where)
    return where, WeightFiles([*found["files"]], found.get("sums", {}))


def manifest_hash(folder: str | AnyPath) -> str:
    """Returns the hash in the manifest of a model folder, or in that of a run's newest checkpoint.

    It covers the content sums of the weights, so other weights have another hash.

    Raises:
        Damaged: the files are not those that were written.
        InputError: the folder contains no model, or the run has no checkpoint yet.
    """
    folder = parse_path(folder)
    read_model_config(folder)
    where, _ = weights_location(folder)
    return verified_manifest(where if is_run_folder(folder) else folder)["sha256"]


def save_model(
    folder: str | AnyPath,
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    tokenizer: Tokenizer | None,
) -> None:
    """Writes a model folder, which can be read once it is complete, or not at all.

    On several hosts all hosts must call this: each writes its shards of the weights into the same
    folder on shared storage, and host 0 creates the folder and writes the other files.

    >>> lj.save_model("models/mine", config, model, tokenizer)
    >>> lj.load("models/mine")[0] == config
    True

    Raises:
        InputError: `folder` already exists, or another process is writing it.
        Fault: the system can't write it.
    """
    folder = parse_path(folder)
    if isinstance(model, UnstackedLlama):
        weights = tree_to_dict(restore_layout(model))
        layers = weights["layers"].values()
        weights["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    else:
        weights = tree_to_dict(model)
    specs = array_files.array_specs(weights)
    files = model_files(config, specs, tokenizer) if hosts.is_host_zero() else {}
    with contextlib.ExitStack() as stack:

        def begin() -> str:
            partial = stack.enter_context(new_folder(folder)).absolute()
            write_many(partial, files)
            return str(partial)

        partial = parse_path(hosts.broadcast_decision(begin))
        stores = array_files.open_for_writing(partial / "weights" / "model", specs)
        shards = array_files.copy_shards({"model": weights})["model"]
        array_files.write_shards(stores, shards)
        sums = hosts.gather(array_files.sum_shards(stores, shards))  # all have written
        if hosts.is_host_zero():
            write_manifest(partial, manifest_of(config, files, complete_sums(sums)))
    hosts.broadcast_decision(lambda: None)  # all hosts return after host 0 has renamed the folder


def model_files(
    config: ModelConfig, specs: Mapping[str, array_files.ArraySpec], tokenizer: Tokenizer | None
) -> dict[str, bytes]:
    """Returns the small files of a model folder by relative name, except its manifest."""
    weights = array_files.metadata({"model": specs})
    return {
        "config.json": json.dumps(dataclasses.asdict(config), indent=1).encode(),
        **{f"weights/{name}": data for name, data in weights.items()},
        **(tokenizer.files if tokenizer else {}),
    }


def manifest_of(
    config: ModelConfig, files: Mapping[str, bytes], sums: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the content of the manifest of a model folder with these files and content sums.

    `config.json` is compared by its meaning, since users may change how a model is computed.
    """
    hashes = {name: hash_bytes(data) for name, data in files.items() if name != "config.json"}
    return {
        "format": 1,
        "config": dataclasses.asdict(config),
        "files": hashes,
        "sums": {f"model/{name}": value for name, value in sums.items()},
    }


def load_model(
    folder: str | AnyPath,
    config: ModelConfig | None = None,
    like: Llama | None = None,
    *,
    aliased: bool = False,
) -> tuple[ModelConfig, Llama]:
    """Returns a model from a model folder, or from a run's newest checkpoint, on the current mesh.

    Args:
        folder: a model folder, or a run folder.
        config: how to compute; default: the folder's configuration. Weights are cast to its
            `param_dtype`.
        like: shapes, dtypes and shardings of the weights; default: those of `config`.
        aliased: as in `load_items`, for weights that no program is to overwrite.

    Raises:
        Damaged: the files are not those that were written.
        InputError: the folder contains no model (that of a LoRA run is `inference.load`'s), or
            doesn't fit `config`.
    """
    folder = parse_path(folder)
    if is_lora_run(folder):
        raise InputError(
            f"{folder} is a LoRA run, whose checkpoints contain low-rank pairs only: create a model"
            f" with `llama-jax convert {folder} MERGED`, and give MERGED"
        )
    own_config = read_model_config(folder)
    config = config or own_config
    if config.quantized != own_config.quantized:
        raise InputError(
            f"model.quantized is {config.quantized}, but the weights in {folder} are stored as"
            f" {own_config.quantized}: give the folder from which it was converted"
        )
    model = like or abstract_model(config)
    where, files = weights_location(folder)
    wanted = {"model": tree_to_dict(model)}
    loaded = load_items(where, files.names, wanted, files.sums, aliased=aliased)
    return config, dict_to_tree(model, loaded["model"])
