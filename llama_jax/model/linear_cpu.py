"""Matrix products for XLA:CPU: transposed weights, blocks that fit a core's cache, float32 sums."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.model.quantize import Int8Matrix, output_dims
from llama_jax.parallel.collectives import gather_weight
from llama_jax.parallel.mesh import divisors, platform
from llama_jax.parallel.sharding import activation_spec

# XLA:CPU materializes a converted matrix before the product, on one core. For up to FEW_ROWS rows
# of activations the matrix is therefore converted in blocks of _BLOCK elements, which stay in the
# core's cache: twice as fast as float32 weights, ten times as fast as converting the full matrix.
_BLOCK = 1 << 16
FEW_ROWS = 64
_MANY_ROWS = 256  # above this, transposing the activations costs more than transposing the weight


def einsum_in_given_order(
    equation: str, x: jax.Array, y: jax.Array, sharding, dtype: Any = None
) -> jax.Array:
    """Returns the einsum with the contracted letters in the equation's order, in x's dtype.

    jnp.einsum sorts the contracted letters: H, N for "BTNH,NHD->BTD". XLA:CPU then materializes a
    transpose of both operands. So the letters are renamed a, b, … in the order of the equation.

    Args:
        dtype: of accumulation and result, instead of x's.
    """
    letters = sorted(set(equation) - set(",->"), key=equation.index)
    ascending = str.maketrans({letter: chr(ord("a") + i) for i, letter in enumerate(letters)})
    equation = equation.translate(ascending)
    product_dtype = dtype or accumulate_dtype(x.dtype)
    out = jnp.einsum(equation, x, y, out_sharding=sharding, preferred_element_type=product_dtype)
    return out.astype(dtype or x.dtype)


class Transposed(nnx.Param):
    """A matrix with the axes [out…, in…], for inference on a CPU; `matmul` gives it no gradient."""


def transpose_weight(w: nnx.Param | Int8Matrix, dims: str) -> nnx.Param | Int8Matrix:
    """Returns a matrix in the layout that is fastest for decoding: transposed on a CPU.

    On XLA:CPU a product with 8 rows is 1.1 to 1.6 times as fast in float32, and 1.5 to 3.5 times in
    bfloat16, if the matrix is the first operand and its output axes come first.
    """
    if isinstance(w, Int8Matrix) or platform() != "cpu":
        return w
    return Transposed(jnp.moveaxis(w[...], *_contracted_axes(dims)))


def restore_weight(w: nnx.Param | Int8Matrix, dims: str) -> nnx.Param | Int8Matrix:
    """Returns a matrix with the axes `dims`: undoes `transpose_weight`."""
    if not isinstance(w, Transposed):
        return w
    return nnx.Param(jnp.moveaxis(w[...], *_contracted_axes(dims)[::-1]))


def _contracted_axes(dims: str) -> tuple[list[int], list[int]]:
    """Returns the contracted axes of a matrix, and their axes in a `Transposed`."""
    contracted = [axis for axis, letter in enumerate(dims) if letter not in output_dims(dims)]
    return contracted, list(range(-len(contracted), 0))


def einsum_transposed(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns the einsum with a transposed matrix.

    Args:
        equation: of the matrix as it is stored, such as "BTD,DNH->BTNH".
        w: has its output axes first ([N, H, D] for this equation).
    """
    x_dims, w_dims, y_dims = equation.replace("->", ",").split(",")
    out = output_dims(w_dims)
    dims = out + "".join(letter for letter in w_dims if letter not in out)
    w = gather_weight(w, dims, x.dtype)
    if x.shape[0] * x.shape[1] > _MANY_ROWS:
        return einsum_in_given_order(f"{x_dims},{dims}->{y_dims}", x, w, activation_spec(y_dims))
    y = einsum_in_given_order(f"{dims},{x_dims}->{out}BT", w, x, activation_spec(f"{out}BT"))
    return jnp.moveaxis(y, (-2, -1), (0, 1))


def einsum_in_blocks(equation: str, x: jax.Array, values: jax.Array) -> jax.Array:
    """Returns the einsum in float32, computed from one block of the matrix at a time."""
    x_dims, w_dims, y_dims = equation.replace("->", ",").split(",")
    out = [size for size, letter in zip(values.shape, w_dims, strict=True) if letter in y_dims]
    # [out, in]: each block gives a slice of the result. [in, out]: each gives a term of its sum.
    by_outputs = w_dims[0] in y_dims

    def local(x: jax.Array, values: jax.Array) -> jax.Array:
        rows = x.reshape(math.prod(x.shape[:2]), -1).astype(jnp.float32)
        length = math.prod(out) if by_outputs else rows.shape[1]
        width = values.size // length
        size = max(n for n in divisors(length) if n <= max(_BLOCK // width, 16))
        blocks = values.reshape(-1, size, width)
        if by_outputs:
            y = jax.lax.map(lambda block: rows @ block.astype(jnp.float32).T, blocks).swapaxes(0, 1)
        else:
            parts = rows.reshape(len(rows), -1, size).swapaxes(0, 1)

            def add(y: jax.Array, operands: tuple[jax.Array, jax.Array]):
                part, block = operands
                return y + part @ block.astype(jnp.float32), None

            y, _ = jax.lax.scan(add, jnp.zeros((len(rows), width)), (parts, blocks))
        return y.reshape(*x.shape[:2], *out)

    specs = activation_spec(x_dims), activation_spec(w_dims)
    mapped = jax.shard_map(
        local, in_specs=specs, out_specs=activation_spec(y_dims), check_vma=False
    )
    return mapped(jax.reshard(x, specs[0]), values)


def accumulate_dtype(dtype: Any) -> Any:
    """Returns the dtype to request of a product whose result is then cast to `dtype`.

    For bfloat16 operands XLA:CPU uses the matrix unit only if the product's dtype is float32: up to
    seven times as fast.
    """
    return jnp.float32 if platform() == "cpu" else dtype


def einsum_float32(equation: str, x: jax.Array, dy: jax.Array) -> jax.Array:
    """Returns the einsum in float32: a weight's gradient, summed over the operands' first letters.

    For such a sum XLA:CPU has no product of bfloat16 operands with a float32 result, so the
    operands are cast to float32 there.
    """
    if platform() == "cpu":
        x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    return jnp.einsum(equation, x, dy, preferred_element_type=jnp.float32)
