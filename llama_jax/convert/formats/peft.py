"""Reads and writes PEFT's LoRA folders: adapter_config.json and adapter_model.safetensors.

The format: peft's `LoraConfig` and `get_peft_model_state_dict`. PEFT's A is [R, in] and its B is
[out, R]; our a is [in…, R] and our b is [R, out…]. Rotary halves are half a head apart in both.
"""

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from llama_jax.checkpoint.lora_pairs import Pair, StoredPairs, pair_shapes
from llama_jax.config.lora import IN_OUT_DIMS, LoraConfig
from llama_jax.config.model import ModelConfig
from llama_jax.config.validation import first_problem
from llama_jax.convert.files.safetensors import SafetensorsWriter, read_safetensors
from llama_jax.convert.files.tensor_file import StoredTensor, quote
from llama_jax.convert.files.torch_zip import read_torch
from llama_jax.convert.formats.huggingface import NAMES
from llama_jax.convert.source import FLOATS, positive_float, positive_int, read_json
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath
from llama_jax.tokenizer.settings import to_json

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"  # of PEFT before 0.7
_MODULES = {name: NAMES[name].removesuffix(".weight") for name in IN_OUT_DIMS}
# Keys that don't change what the pairs compute, whatever their value.
_DESCRIPTIVE = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
_READ = {"init_lora_weights", "lora_alpha", "peft_type", "r", "target_modules", "use_rslora"}
# Initializations that also change the weights of the base, so the pairs don't fit the original.
_CHANGE_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")


def is_peft_folder(folder: AnyPath) -> bool:
    """Returns whether `folder` is one that PEFT or `write` has written."""
    return (folder / CONFIG).is_file()


def read(folder: AnyPath, config: ModelConfig) -> StoredPairs:
    """Returns the low-rank pairs in a PEFT folder.

    A `target_modules` that is a regular expression is not evaluated: the tensors determine the
    targets.

    Args:
        folder: the folder.
        config: of the base.

    Raises:
        InputError: a file is missing or damaged, the pairs don't fit the base, or they use a
            feature of PEFT that is not supported.
    """
    settings, path = read_json(folder / CONFIG), folder / CONFIG
    _check_settings(settings, path)
    file, tensors = _read_tensors(folder)
    targets = _targets(file, tensors, config)
    _check_target_modules(settings, path, targets, config)
    fields: dict[str, Any] = {
        "rank": positive_int(settings, "r", path),
        "alpha": positive_float(settings, "lora_alpha", None, path),
        "targets": targets,
        "rank_stabilized": settings.get("use_rslora") or False,
    }
    try:
        lora = LoraConfig(**fields)
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error).sentence()}: correct the file") from error
    for name in targets:
        for layer in range(config.n_layers):
            for (tensor_name, shape), tensor in zip(
                _specs(config, lora.rank, name, layer),
                _stored_pair(tensors, name, layer),
                strict=True,
            ):
                _check_tensor(file, tensor_name, tensor, shape)

    def read_pair(name: str, layer: int) -> Pair:
        matrices = (tensor.read() for tensor in _stored_pair(tensors, name, layer))
        shapes = pair_shapes(config, lora, name)
        a, b = (
            np.array(matrix.T, np.float32, order="C").reshape(shape)
            for matrix, shape in zip(matrices, shapes, strict=True)
        )
        return Pair(a, b)

    return StoredPairs(folder, lora, None, read_pair)


def write(folder: Path, config: ModelConfig, pairs: StoredPairs) -> None:
    """Writes the two files of a PEFT folder; the pairs are float32.

    Args:
        folder: an existing folder.
        config: of the base.
        pairs: the pairs to write.
    """
    lora = pairs.lora
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        # An integer if it is one, as PEFT declares it.
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "use_dora": False,
        "target_modules": [_MODULES[name].rpartition(".")[2] for name in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    (folder / CONFIG).write_bytes(to_json(content))
    order = [(name, layer) for layer in range(config.n_layers) for name in lora.targets]
    header = {
        tensor: (shape, np.float32)
        for name, layer in order
        for tensor, shape in _specs(config, lora.rank, name, layer)
    }
    with SafetensorsWriter(folder / _WEIGHTS, header) as writer:
        for name, layer in order:
            a, b = pairs.read(name, layer)
            matrices = a.reshape(-1, lora.rank).T, b.reshape(lora.rank, -1).T
            specs = _specs(config, lora.rank, name, layer)
            for (tensor, _), matrix in zip(specs, matrices, strict=True):
                writer.write(tensor, matrix)


def _names(name: str, layer: int) -> tuple[str, str]:
    """Returns the names of PEFT's A and B."""
    module = f"base_model.model.{_MODULES[name].format(layer)}"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _specs(
    config: ModelConfig, rank: int, name: str, layer: int
) -> list[tuple[str, tuple[int, int]]]:
    """Returns name and shape of PEFT's A and B."""
    inputs, outputs = (config.count(letters) for letters in IN_OUT_DIMS[name])
    return list(zip(_names(name, layer), [(rank, inputs), (outputs, rank)], strict=True))


def _stored_pair(
    tensors: dict[str, StoredTensor], name: str, layer: int
) -> tuple[StoredTensor, StoredTensor]:
    a, b = _names(name, layer)
    return tensors[a], tensors[b]


def _read_tensors(folder: AnyPath) -> tuple[AnyPath, dict[str, StoredTensor]]:
    """Returns the file of the tensors and its tensors by name."""
    if not (folder / _WEIGHTS).is_file() and (folder / _PICKLED).is_file():
        return folder / _PICKLED, read_torch(folder / _PICKLED)
    return folder / _WEIGHTS, read_safetensors(folder / _WEIGHTS)


def _check_settings(settings: dict[str, Any], path: AnyPath) -> None:
    """Refuses settings that are not plain LoRA.

    Raises:
        InputError: a key asks for a feature that is not supported, or has a wrong type.
    """
    if settings.get("peft_type") != "LORA":
        raise InputError(
            f"{path} has {quote(settings.get('peft_type'))} as peft_type: only LORA is supported,"
            " so give another adapter, or merge this one with PEFT"
        )
    initialization = settings.get("init_lora_weights")
    if isinstance(initialization, str) and initialization.lower().startswith(_CHANGE_BASE):
        raise InputError(
            f"{path} has {quote(initialization)} as init_lora_weights, which also changes the"
            " weights of the base: convert the adapter to plain LoRA with PEFT"
            " (path_initial_model_for_weight_conversion)"
        )
    if not isinstance(settings.get("use_rslora"), bool | None):
        raise InputError(
            f"{path} has {quote(settings['use_rslora'])} as use_rslora, which must be true or"
            " false: correct the file"
        )
    for key, value in settings.items():
        if key not in _DESCRIPTIVE | _READ and value and value != "none":
            raise InputError(
                f"{path} sets {quote(key)[1:-1]}, which is not supported: merge the adapter with"
                " PEFT, and convert the merged model"
            )


def _targets(
    file: AnyPath, tensors: dict[str, StoredTensor], config: ModelConfig
) -> tuple[str, ...]:
    """Returns the weights that have pairs, under our names.

    Raises:
        InputError: there are none, a layer has no pair, or there are other tensors.
    """
    expected = {
        name: {tensor for i in range(config.n_layers) for tensor in _names(name, i)}
        for name in IN_OUT_DIMS
    }
    targets = tuple(name for name, names in expected.items() if names & tensors.keys())
    names = {tensor for name in targets for tensor in expected[name]}
    unknown, missing = min(tensors.keys() - names, default=None), names - tensors.keys()
    if unknown is not None or not targets:
        problem = "no tensors" if unknown is None else quote(unknown)[1:-1]
        raise InputError(
            f"{file} contains {problem}: pairs of the matrices in the {config.n_layers} layers of"
            " the base are supported, and no other tensors: give the adapter of this model, or"
            " merge it with PEFT"
        )
    if missing:
        raise InputError(
            f"{file} lacks {min(missing)}, but other layers or the other half of the pair are"
            " there: fetch it again, or merge the adapter with PEFT"
        )
    return targets


def _check_target_modules(
    settings: dict[str, Any], path: AnyPath, targets: tuple[str, ...], config: ModelConfig
) -> None:
    """Compares a list `target_modules` with the tensors that are there.

    Raises:
        InputError: they differ, or it is neither a list of names nor a regular expression.
    """
    listed = settings.get("target_modules")
    if isinstance(listed, str) or settings.get("exclude_modules"):
        return
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise InputError(
            f"{path} has {quote(listed)} as target_modules, which must be a list of names or a"
            " regular expression: correct the file"
        )
    for name, module in _MODULES.items():
        for layer in range(config.n_layers):
            full = f".{module.format(layer)}"
            if any(full.endswith(f".{suffix}") for suffix in listed) != (name in targets):
                has = "has" if name in targets else "has no"
                raise InputError(
                    f"{path} and the tensors next to it disagree: {full[1:]} {has} pair there, but"
                    " target_modules says otherwise: fetch both again"
                )


def _check_tensor(file: AnyPath, name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    """Checks shape and type of a tensor.

    Raises:
        InputError: one is wrong.
    """
    if tensor.shape != shape:
        raise InputError(
            f"{file}: {name} is {tensor.shape}, but {CONFIG} and the base require {shape}: give the"
            " adapter of this model, or correct r"
        )
    if tensor.dtype.name not in FLOATS:
        raise InputError(
            f"{file}: {name} is of type {tensor.dtype.name}: pairs must be one of"
            f" {', '.join(FLOATS)}"
        )
