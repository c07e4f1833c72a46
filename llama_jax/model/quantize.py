"""Matrices as int8 with a float32 scale for each output channel, for inference.

Symmetric, weights alone: a channel's scale is its largest magnitude over 127, and activations stay
as they are. What a matrix was is off by at most half a scale.
"""

# Why not qwix (0.1.8, tried; it needs nothing beyond flax, opt_einsum and absl-py): it quantizes
# modules by running them and intercepting their calls, and ours have none to run. Its arrays alone
# keep a scale's summed axes at length 1, and its einsum takes no out_sharding: on an Explicit mesh
# the product that sums over a split axis (wo, w2) is refused.

from typing import Any

import jax
import numpy as np
from flax import nnx

from llama_jax.config.model import ModelConfig
from llama_jax.model.summary import WeightsModule

_SUMMED = {"VD": "D", "NHD": "NH"}  # of the others, the first letter
# A layer's, with their letters.
MATRIX_DIMS = {
    "wq": "DNH",
    "wk": "DKH",
    "wv": "DKH",
    "wo": "NHD",
    "w1": "DF",
    "w3": "DF",
    "w2": "FD",
}
# A hair below 127: numbers of few bits are often just half of their channel's largest, 63.5 steps,
# and how the last bit of a division is rounded must not decide where they go.
_STEPS = 127 * (1 - 2**-20)


class Int8Matrix(WeightsModule):
    """A matrix of a model: `values` int8, `scale` float32 over the letters `output_dims(dims)`."""

    def __init__(self, values: jax.Array, scale: jax.Array):
        self.values = nnx.Param(values)
        self.scale = nnx.Param(scale)


def output_dims(dims: str) -> str:
    """Returns the letters of a matrix that a product keeps: 'DNH' -> 'NH', 'VD' -> 'V'.

    The embedding's are its rows: that serves the look-up and a tied head alike.
    """
    summed = _SUMMED.get(dims, dims[0])
    return "".join(letter for letter in dims if letter not in summed)


def quantize_int8(w: Any, dims: str) -> tuple[Any, Any]:
    """Returns the values [dims] int8 and the scales [output_dims(dims)] float32 of a matrix.

    Args:
        w: a NumPy or JAX array with the axes `dims`, maybe with a leading L.
        dims: its letters, without the L.

    NumPy and XLA on the CPU give the same bits; a processor that rounds divisions otherwise does so
    too for what was bfloat16 or float16. A channel of zeros has scale 0, as has one whose
    scale would be subnormal (some processors take such a number for 0, and would divide by it).
    """
    xp = w.__array_namespace__()
    w = w.astype(np.float32)
    axes = tuple(
        dims.index(letter) - len(dims) for letter in dims if letter not in output_dims(dims)
    )
    largest = xp.max(xp.abs(w), axis=axes, keepdims=True)
    scale = largest * np.float32(1 / 127)  # what `/ 127` becomes in XLA, but not in NumPy
    nothing = scale < np.finfo(np.float32).tiny
    steps = np.float32(_STEPS) / xp.where(nothing, np.float32(np.inf), largest)
    values = xp.round(w * steps).astype(np.int8)
    return values, xp.squeeze(xp.where(nothing, np.float32(0), scale), axis=axes)


def matrix_param(config: ModelConfig, w: jax.Array, dims: str) -> Any:
    """Returns a matrix as `config` wants it kept: an nnx.Param, or an Int8Matrix."""
    return Int8Matrix(*quantize_int8(w, dims)) if config.quantized == "int8" else nnx.Param(w)
