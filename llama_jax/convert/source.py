"""A checkpoint of any format as a source: its configuration, its layout and its tensors."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from llama_jax.config.model import ModelConfig
from llama_jax.config.validation import first_problem
from llama_jax.convert.files.tensor_file import StoredTensor, quote
from llama_jax.convert.layout import Layout, Weight, weights
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, read_file

if TYPE_CHECKING:  # it imports JAX, which `llama-jax info` does not need
    from llama_jax.checkpoint.lora_pairs import StoredPairs

# Tensors that other programs store in addition to the weights: the configuration determines them.
_DERIVED = re.compile(r"rope\.freqs|.*\.rope\.freqs|.*\.inv_freq")

FLOATS = ("float32", "float16", "bfloat16")
_SIZE_LIMIT = 1 << 24  # exceeds all dimensions of models; the longest context is 10 million


@dataclass(frozen=True)
class Source:
    """A checkpoint whose tensors are read one at a time."""

    kind: str  # meta, huggingface, gguf, llama2c or orbax
    path: AnyPath
    config: ModelConfig
    layout: Layout
    shards: tuple[Mapping[str, StoredTensor], ...]  # of each shard: name in the file -> tensor
    dropped: Mapping[str, str] = field(default_factory=dict)  # name in the file -> reason
    pairs: "StoredPairs | None" = None  # low-rank pairs to merge into the weights

    def stored_tensors(self, weight: Weight) -> list[StoredTensor]:
        """Returns the tensors that make up `weight`, in the order of `Layout.tensor_specs`."""
        specs = self.layout.tensor_specs(self.config, weight)
        return [self.shards[shard][name] for shard, name, _ in specs]

    def dtype(self, weight: Weight) -> np.dtype:
        """Returns the type in which `weight` is stored."""
        return self.stored_tensors(weight)[0].dtype

    def nbytes(self, weight: Weight) -> int:
        """Returns the size of the tensors that make up `weight`, once read [bytes]."""
        return sum(tensor.nbytes for tensor in self.stored_tensors(weight))


def validate_source(source: Source) -> Source:
    """Checks the name, shape and type of every tensor; returns `source` with the dropped tensors.

    Raises:
        InputError: a tensor is missing, unknown, of a wrong shape or not of floating-point type.
    """
    if max(source.config.shape("LVDNKHF")) >= _SIZE_LIMIT:
        raise InputError(
            f"{source.path}: a size in the configuration exceeds that of all models: correct the"
            " file"
        )
    unused = [set(shard) for shard in source.shards]
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
                    f"{where}: {name} is {tensor.shape}, but the configuration requires {shape}:"
                    " the files and the configuration are not of one model, fetch both again"
                )
            if tensor.dtype.name not in (*FLOATS, *(["int8"] if source.layout.quantized else [])):
                raise InputError(
                    f"{where}: {name} is of type {tensor.dtype.name}: weights must be one of"
                    f" {', '.join(FLOATS)}"
                )
            types.add(tensor.dtype.name)
            unused[shard].discard(name)
        if len(types) > 1 and not source.layout.quantized:
            raise InputError(
                f"{source.path}: {weight} is {' and '.join(sorted(types))} in different shards: the"
                " files are not of one model, fetch them again"
            )
    for shard, names in enumerate(unused):
        unknown = sorted(name for name in names if not _DERIVED.fullmatch(name))
        if unknown:
            name = quote(unknown[0])[1:-1]
            raise InputError(
                f"{_where(source, shard)} contains {name}, which a LLaMA of this configuration"
                " doesn't have: correct the configuration, or give a LLaMA checkpoint"
            )
    dropped = {name: "follows from the configuration" for names in unused for name in names}
    return replace(source, dropped={**source.dropped, **dropped})


def _where(source: Source, shard: int) -> str:
    return f"{source.path}" + (f", shard {shard}" if len(source.shards) > 1 else "")


def config_dtypes(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Returns `param_dtype`, the type of most of the stored bytes, and a `dtype` for computing."""
    counts = Counter[str]()
    for tensor in tensors.values():
        counts[tensor.dtype.name] += tensor.nbytes
    floats = [name for name in FLOATS if name in counts]
    stored = max(floats, key=counts.__getitem__, default="float32")
    return {"param_dtype": stored, "dtype": "float32" if stored == "float32" else "bfloat16"}


def read_json(path: AnyPath) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        InputError: the file is missing, can't be read, or doesn't contain a JSON object.
    """
    try:
        content = json.loads(read_file(path).decode("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}: the checkpoint needs it, fetch it too") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not valid JSON: fetch it again") from error
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): give another one") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} does not contain a JSON object: fetch it again")
    return content


def model_config(where: AnyPath, **fields: Any) -> ModelConfig:
    """Returns the configuration with these fields, which the caller has read from `where`.

    Raises:
        InputError: a field is invalid.
    """
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(error).sentence()}: correct the file") from error


def positive_int(metadata: Mapping[str, Any], key: str, where: AnyPath) -> int:
    """Returns the positive integer under `key` in the metadata of the file `where`.

    Raises:
        InputError: the value is missing, or not a positive integer.
    """
    value = metadata.get(key)
    if type(value) is not int or not 1 <= value < _SIZE_LIMIT:
        problem = f"lacks {key!r}" if value is None else f"has {quote(value)} as {key}"
        raise InputError(f"{where} {problem}, which must be a positive integer: correct the file")
    return value


def positive_float(
    metadata: Mapping[str, Any], key: str, default: float | None, where: AnyPath
) -> float:
    """Returns the positive number under `key` in the metadata of the file `where`.

    Args:
        metadata: the values by key.
        key: the key.
        default: the number if the key is missing; None if it must not be.
        where: the file, for messages.

    Raises:
        InputError: the value is missing, or not a positive number.
    """
    value = metadata.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise InputError(
            f"{where} has {quote(value)} as {key}, which must be a positive number: correct the"
            " file"
        )
    return float(value)
