"""The plan of a conversion: the type and layout of each weight, and the memory it may use."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.convert.formats import huggingface, meta, model_folder
from llama_jax.convert.layout import AXES, Layout, Weight, weights
from llama_jax.convert.source import Source
from llama_jax.errors import InputError
from llama_jax.runtime.process_memory import available_memory, check_memory, resident

OutputFormat = Literal["orbax", "hf", "meta", "peft"]
GIB = 1 << 30
_SLACK = 64 << 20  # bytes: small temporary objects
_COPIES = 3  # copies of a weight in memory at once: as read, in our layout, as written


@dataclass(frozen=True)
class ConversionPlan:
    """Which tensors a conversion writes, and how much memory it may use."""

    source: Source
    config: ModelConfig  # of the output
    layout: Layout  # of the output
    dtypes: Mapping[Weight, np.dtype]  # of the output, before quantization
    memory_budget: int  # tensors in memory at once [bytes]

    def output_bytes(self) -> int:
        """Returns the size of all tensors of the output [bytes]."""
        return sum(self.layout.nbytes(self.config, w, dtype) for w, dtype in self.dtypes.items())


def make_plan(
    source: Source,
    to: OutputFormat,
    dtype: str | None,
    quantize: Literal["int8"] | None,
    shards: int,
    max_ram: int | None,
) -> ConversionPlan:
    """Returns the plan of a conversion.

    Raises:
        InputError: the source can't be converted to this format, or not within this memory.
    """
    if source.layout.quantized and source.pairs is None:
        raise InputError(
            f"{source.path} is an int8 folder, from which no other format can be restored: convert"
            " the checkpoint from which it was created"
        )
    if quantize and to != "orbax":
        raise InputError(f"--quantize {quantize} is for --to orbax: remove one of the two options")
    # Quantization on load also starts from one type for all weights: the bits are the same.
    one_dtype = source.dtype(Weight("wq", 0)).name if quantize else None
    if source.layout.quantized:  # pairs are merged into dequantized weights
        one_dtype = source.config.param_dtype
    dtypes = _output_dtypes(source, to, dtype or one_dtype)
    config = _output_config(source.config, dtypes, dtype, quantize)
    layout = _output_layout(config, to, shards)
    return ConversionPlan(source, config, layout, dtypes, _memory_budget(source, dtypes, max_ram))


def _output_dtypes(source: Source, to: OutputFormat, dtype: str | None) -> dict[Weight, np.dtype]:
    """Returns the type in which each weight is written."""
    stored = {weight: source.dtype(weight) for weight in weights(source.config)}
    if dtype is not None:
        return dict.fromkeys(stored, jnp.dtype(dtype))
    if to != "orbax":
        return stored
    # An Orbax folder stacks the layers of a weight into one array: its type must represent the
    # values of all layers.
    by_name: dict[str, set[np.dtype]] = {}
    for weight, kind in stored.items():
        by_name.setdefault(weight.name, set()).add(kind)
    common = {name: jnp.result_type(*kinds) for name, kinds in by_name.items()}
    return {weight: common[weight.name] for weight in stored}


def _output_config(
    config: ModelConfig,
    dtypes: Mapping[Weight, np.dtype],
    dtype: str | None,
    quantize: Literal["int8"] | None,
) -> ModelConfig:
    """Returns the configuration of the output; --dtype also sets the type of the computation."""
    param_dtype = dtypes[Weight("wq", 0)].name
    config = replace(config, quantized=quantize or "none", param_dtype=param_dtype)
    if dtype is None:
        return config
    return replace(config, dtype="float32" if param_dtype == "float32" else "bfloat16")


def _output_layout(config: ModelConfig, to: OutputFormat, shards: int) -> Layout:
    if to == "meta":
        return meta.writer_layout(config, shards)
    if shards != 1:
        raise InputError(
            f"--shards is for --to meta; --to {to} chooses the number of files: remove --shards"
        )
    return model_folder.layout(config) if to == "orbax" else Layout(huggingface.NAMES)


def _memory_budget(source: Source, dtypes: Mapping[Weight, np.dtype], max_ram: int | None) -> int:
    """Returns how many bytes of tensors may be in memory at once.

    Raises:
        InputError: not even the largest weight fits.
    """
    largest = max(conversion_bytes(source, dtypes, weight) for weight in dtypes)
    base = resident() + _SLACK
    if max_ram is None:
        check_memory(largest + _SLACK, "the largest weight, while it is converted,")
        return min(max(GIB - base, 0) + largest, available_memory() - _SLACK)
    if base + largest > max_ram:
        raise InputError(
            f"--max-ram {max_ram / GIB:.2f}GiB is too little: the largest weight takes"
            f" {largest / GIB:.2f} GiB while it is converted, and the program itself"
            f" {base / GIB:.2f} GiB; give at least {(base + largest) / GIB + 0.005:.2f}GiB"
        )
    return max_ram - base


def conversion_bytes(source: Source, dtypes: Mapping[Weight, np.dtype], weight: Weight) -> int:
    """Returns how much memory the conversion of `weight` takes [bytes]."""
    itemsize = max(source.dtype(weight).itemsize, dtypes[weight].itemsize)
    if source.pairs or source.layout.quantized:
        itemsize = max(itemsize, 4)  # merged or dequantized in float32
    return _COPIES * itemsize * math.prod(source.config.shape(AXES[weight.name].ours))
