"""Matrix products for XLA:CPU: blocks that fit a core's cache, float32 sums."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.parallel.mesh import platform
from llama_jax.parallel.sharding import activation_spec

# Up to this many rows of activations, a product with an int8 matrix is computed in int8. With more,
# converting the matrix to the activations' dtype costs less than their additional digits.
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


def einsum_int8(equation: str, x: jax.Array, values: jax.Array) -> jax.Array:
    """Returns the einsum in float32 of activations and int8 values, as a product of int8 matrices.

    XLA:CPU materializes a converted matrix before a product, on one core, but it has kernels for
    products of int8 matrices with at least two rows. So each row of activations is written in
    digits from -127 to 127, whose units are s/127, s/(127·254), …, where s is the row's largest
    magnitude: three digits for float32, with errors of at most s·2^-24, and two for other dtypes,
    s·2^-16. The sums of each digit are exact, so a row has the same result beside others.

    Args:
        equation: the letters of the matrix are in the order of its axes.
        x: [B, T, in…].
        values: int8, [out…, in…] or [in…, out…].
    """
    x_dims, w_dims, y_dims = equation.replace("->", ",").split(",")
    out = [size for size, letter in zip(values.shape, w_dims, strict=True) if letter in y_dims]
    order = "oi" if w_dims[0] in y_dims else "io"
    n_digits = 3 if x.dtype == jnp.float32 else 2

    def local(x: jax.Array, values: jax.Array) -> jax.Array:
        rows = x.reshape(math.prod(x.shape[:2]), -1).astype(jnp.float32)
        largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
        rest = rows * (127 / jnp.where(largest == 0, 1, largest))
        digits = []
        for _ in range(n_digits):
            digits.append(jnp.round(rest))
            rest = (rest - digits[-1]) * 254
        # The matrix is the first operand: its product is up to twice as fast.
        sums = jnp.einsum(
            f"{order},dri->odr",
            values.reshape((-1, rows.shape[1]) if order == "oi" else (rows.shape[1], -1)),
            jnp.stack(digits).astype(jnp.int8),
            preferred_element_type=jnp.int32,
        )
        y = jnp.zeros((), jnp.float32)
        for i in reversed(range(n_digits)):
            y = sums[:, i] + y / 254
        y = y.T * (largest / 127)
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
