"""Matrix products for XLA:CPU: blocks that fit a core's cache, float32 sums."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.parallel.mesh import divisors, platform
from llama_jax.parallel.sharding import activation_spec

# XLA:CPU materializes a converted matrix before the product, on one core. For up to FEW_ROWS rows
# of activations the matrix is therefore converted in blocks of _BLOCK elements, which stay in the
# core's cache: twice as fast as float32 weights, ten times as fast as converting the full matrix.
_BLOCK = 1 << 16
FEW_ROWS = 64


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
