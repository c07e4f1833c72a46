"""Matrix products for XLA:CPU: blocks that fit a core's cache, float32 sums."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.model.quantize import OFFSET
from llama_jax.parallel.mesh import platform
from llama_jax.parallel.sharding import activation_spec
from llama_jax.runtime.cpu import cpu_has_bfloat16, cpu_multiplies_uint8

# Up to this many rows of activations, a product with an int8 matrix is computed in int8. With more,
# converting the matrix to the activations' dtype can cost less than their additional digits.
FEW_ROWS = 128


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
    products of 8-bit matrices with at least two rows. So each row of activations is rounded to
    integers, whose unit is s/(127·256^(n-1)) with the row's largest magnitude s, and written in n
    digits of base 256, from -128 to 127: three for float32, with errors of at most s·2^-24, and two
    for other dtypes, s·2^-16. The sums of each digit are exact, so a row has the same result beside
    others. Those of uint8 values are too large by OFFSET times the sum of the row's digits, and are
    corrected.

    Args:
        equation: the letters of the matrix are in the order of its axes.
        x: [B, T, in…].
        values: int8 [out…, in…] or [in…, out…], or uint8 [out…, in…] (`quantize.add_offset`).
    """
    x_dims, w_dims, y_dims = equation.replace("->", ",").split(",")
    out = [size for size, letter in zip(values.shape, w_dims, strict=True) if letter in y_dims]
    order = "oi" if w_dims[0] in y_dims else "io"
    n_digits = 3 if x.dtype == jnp.float32 else 2
    half = sum(128 << 8 * i for i in range(n_digits))  # 128 in each digit

    def local(x: jax.Array, values: jax.Array) -> jax.Array:
        rows = x.reshape(math.prod(x.shape[:2]), -1).astype(jnp.float32).T
        largest = jnp.max(jnp.abs(rows), axis=0)
        integers = rows * (127 / jnp.where(largest == 0, 1, largest)) * 256 ** (n_digits - 1)
        integers = jnp.round(integers).astype(jnp.int32)
        # The bytes of an integer that is larger by `half` are its digits, each larger by 128.
        digits = jax.lax.bitcast_convert_type((integers + half) ^ half, jnp.int8)[..., :n_digits]
        # The matrix is the first operand: its product is up to twice as fast.
        matrix = values.reshape((-1, len(rows)) if order == "oi" else (len(rows), -1))
        sums = _sum_products(f"{order},ird->ord", matrix, digits)
        if values.dtype == jnp.uint8:
            sums -= OFFSET * jnp.sum(digits.astype(jnp.int32), axis=0)
        y = jnp.zeros((), jnp.float32)
        for i in range(n_digits):
            y = sums[..., i] + y / 256
        y = (y * (largest / 127)).T
        return y.reshape(*x.shape[:2], *out)

    specs = activation_spec(x_dims), activation_spec(w_dims)
    mapped = jax.shard_map(
        local, in_specs=specs, out_specs=activation_spec(y_dims), check_vma=False
    )
    return mapped(jax.reshard(x, specs[0]), values)


def _sum_products(equation: str, matrix: jax.Array, digits: jax.Array) -> jax.Array:
    """Returns the einsum of two 8-bit operands in int32."""
    # With this precision JAX gives XLA operands of two dtypes as they are.
    precision = jax.lax.DotAlgorithmPreset.DEFAULT
    return jnp.einsum(
        equation, matrix, digits, precision=precision, preferred_element_type=jnp.int32
    )


@functools.cache
def has_uint8_kernels() -> bool:
    """Returns whether XLA has kernels for the product of a uint8 matrix and int8 digits here."""
    if not cpu_multiplies_uint8():
        return False
    operands = jax.ShapeDtypeStruct((8, 64), jnp.uint8), jax.ShapeDtypeStruct((64, 4), jnp.int8)
    lowered = jax.jit(_sum_products, static_argnums=0).lower("oi,ij->oj", *operands)
    try:
        program = lowered.compile().as_text() or ""
    except jax.errors.JaxRuntimeError:  # XLA without YNNPACK compiles it for some shapes only
        return False
    return "__ynn_fusion" in program


def accumulate_dtype(dtype: Any) -> Any:
    """Returns the dtype to request of a product whose result is then cast to `dtype`.

    For bfloat16 operands XLA:CPU uses the matrix unit only if the product's dtype is float32: up to
    seven times as fast.
    """
    return jnp.float32 if platform() == "cpu" else dtype


def einsum_float32(equation: str, x: jax.Array, dy: jax.Array) -> jax.Array:
    """Returns the einsum in float32: a weight's gradient, summed over the operands' first letters.

    XLA:CPU has kernels for bfloat16 operands only if they contract the last axis of the first
    operand: so x is transposed there. (Without bfloat16 instructions XLA converts both to float32.)
    """
    if platform() == "cpu" and x.dtype == jnp.bfloat16 and cpu_has_bfloat16():
        x_dims, y_dims, w_dims = equation.replace("->", ",").split(",")
        summed = "".join(letter for letter in x_dims if letter not in w_dims)
        equation = f"{x_dims.removeprefix(summed)}{summed},{y_dims}->{w_dims}"
        x = _move_to_end(x, len(summed))
    return jnp.einsum(equation, x, dy, preferred_element_type=jnp.float32)


def _move_to_end(x: jax.Array, n: int) -> jax.Array:
    """Returns x with its first `n` axes at the end, materialized in this order.

    XLA would merge a transpose of two axes, but not one of three, with the product that reads it.
    """
    rows, rest = math.prod(x.shape[:n]), x.shape[n:]
    columns = x.reshape(-1, math.gcd(rows, 16), math.prod(rest)).transpose(2, 0, 1)
    return columns.reshape(*rest, *x.shape[:n])
