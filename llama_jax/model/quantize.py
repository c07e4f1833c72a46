"""Matrices as int8 with a float32 scale for each output channel, for inference.

Symmetric, weight-only quantization: a channel's scale is its largest magnitude over 127, and the
activations are not quantized (`linear_cpu.einsum_int8` writes them in digits of their precision).
The error of a weight is at most half its channel's scale.
"""

# Why not qwix (0.1.8, tried; its only dependencies are flax, opt_einsum and absl-py): it quantizes
# modules by running them and intercepting their calls, but our modules have no calls. Its array
# type gives the contracted axes of a scale length 1, and its einsum has no out_sharding: on an
# Explicit mesh JAX rejects the products that contract a sharded axis (wo, w2).

from typing import Any

import jax
import numpy as np
from flax import nnx

from llama_jax.config.model import ModelConfig
from llama_jax.model.summary import WeightsModule

_CONTRACTED = {"VD": "D", "NHD": "NH"}  # for every other matrix, the first letter
# The axes of a layer's matrices.
MATRIX_DIMS = {
    "wq": "DNH",
    "wk": "DKH",
    "wv": "DKH",
    "wo": "NHD",
    "w1": "DF",
    "w3": "DF",
    "w2": "FD",
}
# Slightly below 127. An element of a low-precision dtype is often exactly half of its channel's
# largest, 63.5 steps; the rounding of a division's last bit must not decide between 63 and 64.
_STEPS = 127 * (1 - 2**-20)
OFFSET = 128  # of `add_offset`


class Int8Matrix(WeightsModule):
    """A matrix: `values` [dims] int8, `scale` [output_dims(dims)] float32.

    In inference on a CPU the values may be uint8: see `add_offset`.
    """

    def __init__(self, values: nnx.Param, scale: nnx.Param):
        self.values = values
        self.scale = scale


def output_dims(dims: str) -> str:
    """Returns the output letters of a matrix, which a product doesn't contract: 'DNH' -> 'NH'.

    Those of the embedding are its rows, 'VD' -> 'V', which suits both the lookup and a tied head.
    """
    contracted = _CONTRACTED.get(dims, dims[0])
    return "".join(letter for letter in dims if letter not in contracted)


def quantize_int8(w: Any, dims: str) -> tuple[Any, Any]:
    """Returns the values [dims] int8 and the scales [output_dims(dims)] float32 of a matrix.

    NumPy and XLA:CPU return the same bits. A processor that rounds divisions differently returns
    them too if the weights were bfloat16 or float16. A channel of zeros has scale 0, and so has a
    channel whose scale would be subnormal: some processors flush such a number to 0 and would
    divide by it.

    Args:
        w: a NumPy or JAX array with the axes `dims`, optionally after a leading L.
        dims: the letters of its axes, without the L.
    """
    xp = w.__array_namespace__()
    w = w.astype(np.float32)
    axes = tuple(
        dims.index(letter) - len(dims) for letter in dims if letter not in output_dims(dims)
    )
    largest = xp.max(xp.abs(w), axis=axes, keepdims=True)
    scale = largest * np.float32(1 / 127)  # XLA compiles `/ 127` to this product, NumPy does not
    is_zero = scale < np.finfo(np.float32).tiny
    steps = np.float32(_STEPS) / xp.where(is_zero, np.float32(np.inf), largest)
    values = xp.round(w * steps).astype(np.int8)
    return values, xp.squeeze(xp.where(is_zero, np.float32(0), scale), axis=axes)


def add_offset(values: jax.Array) -> jax.Array:
    """Returns int8 values as uint8 values that are larger by OFFSET.

    The instructions of AVX512-VNNI and AMX multiply uint8 with int8. XLA:CPU's kernels for two int8
    matrices convert the first one in each product, or don't use these instructions.
    """
    return jax.lax.bitcast_convert_type(values, np.uint8) ^ OFFSET


def remove_offset(values: jax.Array) -> jax.Array:
    """Returns the int8 values: undoes `add_offset`, if it was applied."""
    if values.dtype == np.int8:
        return values
    return jax.lax.bitcast_convert_type(values ^ OFFSET, np.int8)


def matrix_param(config: ModelConfig, w: jax.Array, dims: str) -> Any:
    """Returns a matrix in the storage that `config.quantized` selects: nnx.Param or Int8Matrix."""
    if config.quantized != "int8":
        return nnx.Param(w)
    values, scale = quantize_int8(w, dims)
    return Int8Matrix(nnx.Param(values), nnx.Param(scale))
