"""A checkpoint to read, whatever its format: its shape, its layout, its tensors."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from llama_jax.config.model import ModelConfig
from llama_jax.config.validation import first_problem
from llama_jax.convert.files.tensor_file import StoredTensor, quote
from llama_jax.convert.layout import Layout, Weight, weights
from llama_jax.errors import InputError
from llama_jax.runtime.regular_file import read_regular

# What other programs keep beside the weights and what follows from the configuration.
_NO_WEIGHTS = re.compile(r"rope\.freqs|.*\.rope\.freqs|.*\.inv_freq")

FLOATS = ("float32", "float16", "bfloat16")
_BEYOND = 1 << 24  # no size of a model comes near it; the longest context is 10 million


@dataclass(frozen=True)
class Source:
    """A checkpoint whose tensors are read one by one."""

    kind: str  # meta, huggingface, gguf, llama2c or orbax
    path: Path
    config: ModelConfig
    layout: Layout
    shards: tuple[Mapping[str, StoredTensor], ...]  # of each shard: their name -> tensor
    dropped: Mapping[str, str] = field(default_factory=dict)  # their name -> why

    def stored_tensors(self, weight: Weight) -> list[StoredTensor]:
        """Returns the tensors that make up `weight`, in the order of `Layout.tensor_specs`."""
        pieces = self.layout.tensor_specs(self.config, weight)
        return [self.shards[shard][name] for shard, name, _ in pieces]

    def dtype(self, weight: Weight) -> np.dtype:
        """Returns the type that `weight` is stored in."""
        return self.stored_tensors(weight)[0].dtype

    def nbytes(self, weight: Weight) -> int:
        """Returns the size of the tensors that make up `weight`, once read [bytes]."""
        return sum(tensor.nbytes for tensor in self.stored_tensors(weight))


def validate_source(source: Source) -> Source:
    """Returns `source` without what is no weight, after a look at every name, shape and type.

    Raises:
        InputError: a tensor is missing, unknown, misshapen, or not of floating-point numbers.
    """
    if max(source.config.shape("LVDNKHF")) >= _BEYOND:
        raise InputError(
            f"{source.path} has a size beyond all models in its configuration: correct the file"
        )
    left = [set(shard) for shard in source.shards]
    for weight in weights(source.config):
        types = set[str]()
        for shard, name, shape in source.layout.tensor_specs(source.config, weight):
            tensor, where = source.shards[shard].get(name), _where(source, shard)
            if tensor is None:
                raise InputError(
                    f"{where} lacks {name}, which a model of {source.config.n_layers} layers needs:"
                    " fetch the checkpoint again, or correct its configuration"
                )
            if tensor.shape != shape:
                raise InputError(
                    f"{where}: {name} is {tensor.shape}, but the configuration asks for {shape}:"
                    " the files and the configuration are not of one model, fetch both again"
                )
            if tensor.dtype.name not in (*FLOATS, *(["int8"] if source.layout.quantized else [])):
                raise InputError(
                    f"{where}: {name} holds {tensor.dtype.name} numbers: weights must be one of"
                    f" {', '.join(FLOATS)}"
                )
            types.add(tensor.dtype.name)
            left[shard].discard(name)
        if len(types) > 1 and not source.layout.quantized:
            raise InputError(
                f"{source.path}: {weight} is {' and '.join(sorted(types))} in different shards: the"
                " files are not of one model, fetch them again"
            )
    for shard, names in enumerate(left):
        unknown = sorted(name for name in names if not _NO_WEIGHTS.fullmatch(name))
        if unknown:
            name = quote(unknown[0])[1:-1]
            raise InputError(
                f"{_where(source, shard)} holds {name}, which LLaMA of this configuration"
                " doesn't have: correct the configuration, or give a LLaMA checkpoint"
            )
    dropped = {name: "follows from the configuration" for names in left for name in names}
    return replace(source, dropped={**source.dropped, **dropped})


def _where(source: Source, shard: int) -> str:
    return f"{source.path}" + (f", shard {shard}" if len(source.shards) > 1 else "")


def stored_dtype(shards: tuple[Mapping[str, StoredTensor], ...]) -> dict[str, str]:
    """Returns `param_dtype`, the type of most numbers stored, and the `dtype` to compute in."""
    counts = Counter[str]()
    for tensor in shards[0].values():
        counts[tensor.dtype.name] += tensor.nbytes
    kept = max((name for name in FLOATS if name in counts), key=counts.__getitem__, default=None)
    return {
        "param_dtype": kept or "float32",
        "dtype": "float32" if kept in ("float32", None) else "bfloat16",
    }


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        InputError: there is no such file, or it doesn't hold one.
    """
    try:
        found = json.loads(read_regular(path).decode("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}: the checkpoint needs it, fetch it too") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not valid JSON: fetch it again") from error
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): give another one") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} does not hold a JSON object: fetch it again")
    return found


def model_config(where: Path, **fields: Any) -> ModelConfig:
    """Returns the shape with these fields, as read from the file `where`.

    Raises:
        InputError: a field is impossible.
    """
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(error).sentence()}: correct the file") from error


def integer(about: Mapping[str, Any], key: str, where: Path) -> int:
    """Returns the positive integer under `key`.

    Raises:
        InputError: it is missing or another kind of value.
    """
    value = about.get(key)
    if type(value) is not int or not 1 <= value < _BEYOND:
        problem = f"lacks {key!r}" if value is None else f"has {quote(value)} as {key}"
        raise InputError(f"{where} {problem}, which must be a positive integer: correct the file")
    return value


def number(about: Mapping[str, Any], key: str, default: float | None, where: Path) -> float:
    """Returns the positive number under `key`, or the default if there is one.

    Raises:
        InputError: it is another kind of value.
    """
    value = about.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise InputError(
            f"{where} has {quote(value)} as {key}, which must be a positive number: correct the"
            " file"
        )
    return float(value)
