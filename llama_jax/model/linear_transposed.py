"""Matrices that inference stores with their output axes first, and their products."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.model.linear_cpu import einsum_in_given_order, has_uint8_kernels
from llama_jax.model.quantize import Int8Matrix, add_offset, output_dims, remove_offset
from llama_jax.parallel.collectives import gather_weight
from llama_jax.parallel.mesh import platform
from llama_jax.parallel.sharding import activation_spec

_MANY_ROWS = 256  # above this, transposing the activations costs more than transposing the weight


class Transposed(nnx.Param):
    """A matrix, or its int8 values, with the axes [out…, in…]; `matmul` gives it no gradient."""


def transpose_weight(w: Any, dims: str) -> Any:
    """Returns a matrix in the layout that is fastest for decoding.

    CPU: every matrix is transposed; the embedding (V, D) has its output axis first already. On
    XLA:CPU a product with 8 rows is 1.1 to 1.6 times as fast in float32, 1.5 to 3.5 times in
    bfloat16, and up to five times in int8, if the matrix is the first operand and its output axes
    come first. Int8 values become uint8 where XLA has kernels for these (`quantize.add_offset`).

    TPU: wq, wk and wv are transposed. The matrix unit needs tiles of D and H, but those of an array
    [D, N, H] span N and H. The compiler would rearrange wq in each dispatch, or, if its values are
    int8, convert all of it before each product: 193,000 cycles in each layer of 70B on 16 v5e,
    where all other operations of a layer take 71,000.
    """
    if isinstance(w, Int8Matrix):
        values = transpose_weight(w.values, dims)
        if platform() == "cpu" and has_uint8_kernels():
            values = jax.tree.map(add_offset, values)
        return Int8Matrix(values, w.scale)
    is_transposed = platform() == "cpu" or (platform() == "tpu" and len(output_dims(dims)) == 2)
    return _transpose(w, dims) if is_transposed and dims != "VD" else w


def _transpose(w: nnx.Param, dims: str) -> Transposed:
    return Transposed(jnp.moveaxis(w[...], *_contracted_axes(dims)))


def restore_weight(w: Any, dims: str) -> Any:
    """Returns a matrix with the axes `dims`: undoes `transpose_weight`."""
    if isinstance(w, Int8Matrix):
        values = jax.tree.map(remove_offset, w.values)
        return Int8Matrix(restore_weight(values, dims), w.scale)
    if not isinstance(w, Transposed):
        return w
    return nnx.Param(jnp.moveaxis(w[...], *_contracted_axes(dims)[::-1]))


def _contracted_axes(dims: str) -> tuple[list[int], list[int]]:
    """Returns the contracted axes of a matrix, and their axes in a `Transposed`."""
    contracted = [axis for axis, letter in enumerate(dims) if letter not in output_dims(dims)]
    return contracted, list(range(-len(contracted), 0))


def transposed_dims(dims: str) -> str:
    """Returns the letters of a transposed matrix's axes: "DNH" -> "NHD"."""
    out = output_dims(dims)
    return out + "".join(letter for letter in dims if letter not in out)


def einsum_transposed(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns the einsum with a transposed matrix.

    Args:
        equation: of the matrix as it is stored in files, such as "BTD,DNH->BTNH".
        w: has its output axes first ([N, H, D] for this equation).
    """
    x_dims, w_dims, y_dims = equation.replace("->", ",").split(",")
    out, dims = output_dims(w_dims), transposed_dims(w_dims)
    w = gather_weight(w, dims, x.dtype)
    if platform() != "cpu" or x.shape[0] * x.shape[1] > _MANY_ROWS:
        return einsum_in_given_order(f"{x_dims},{dims}->{y_dims}", x, w, activation_spec(y_dims))
    y = einsum_in_given_order(f"{dims},{x_dims}->{out}BT", w, x, activation_spec(f"{out}BT"))
    return jnp.moveaxis(y, (-2, -1), (0, 1))
