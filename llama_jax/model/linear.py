"""Activations times weights: where weights are gathered, and how their gradients are summed.

A matrix is an nnx.Param, or for inference an `Int8Matrix` or `Transposed`, which have no gradient.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.config.model import ModelConfig
from llama_jax.model.linear_cpu import (
    FEW_ROWS,
    Transposed,
    einsum_float32,
    einsum_in_blocks,
    einsum_in_given_order,
    einsum_transposed,
)
from llama_jax.model.quantize import Int8Matrix, output_dims
from llama_jax.parallel.collectives import gather_weight, sum_gradient, vocab_shard_start
from llama_jax.parallel.mesh import is_single_device, platform, vocab_shards
from llama_jax.parallel.sharding import activation_spec, weight_spec


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _einsum(equation: str, reduce_dtype: str, x: jax.Array, w: jax.Array) -> jax.Array:
    w_dims, y_dims = equation.split(",")[1].split("->")
    if w_dims == "VD" and x.shape[1] == 1 and platform() == "cpu":
        return einsum_transposed(equation, x, w)
    w = gather_weight(w, w_dims, x.dtype)
    return einsum_in_given_order(equation, x, w, activation_spec(y_dims))


def _einsum_forward(equation: str, reduce_dtype: str, x: jax.Array, w: jax.Array):
    return _einsum(equation, reduce_dtype, x, w), (x, w)


def _einsum_backward(equation: str, reduce_dtype: str, operands, dy: jax.Array):
    x, w = operands
    inputs, y_dims = equation.split("->")
    x_dims, w_dims = inputs.split(",")
    w_gathered = gather_weight(w, w_dims, x.dtype)
    dx = einsum_in_given_order(
        f"{y_dims},{w_dims}->{x_dims}", dy, w_gathered, jax.typeof(x).sharding
    )

    def weight_gradient(x, dy):
        # All positions of the batch in one row: as two letters, they would be summed one by one.
        x, dy = (a.reshape(-1, *a.shape[2:]) for a in (x, dy))
        # On 64 TPU chips the compiler scatters w2's gradient as it sums it, and sums w1's whole.
        dims = "FD" if w_dims == "DF" and platform() == "tpu" else w_dims
        equation = f"M{x_dims[2:]},M{y_dims[2:]}->{dims}"
        dw = sum_gradient(einsum_float32(equation, x, dy).astype(w.dtype), dims, reduce_dtype)
        return dw if dims == w_dims else dw.T

    specs = activation_spec(x_dims), activation_spec(y_dims)
    mapped = jax.shard_map(
        weight_gradient, in_specs=specs, out_specs=weight_spec(w_dims), check_vma=False
    )
    return dx, mapped(jax.reshard(x, specs[0]), dy)


# The gradients are those of jnp.einsum, in an order that no compiler has to turn: what JAX derives
# for the weight is dyᵀx, transposed, and a sum over B and T apart, for both of which XLA's CPU back
# end writes out an operand turned. Where it is summed over devices is not left to the compiler.
_einsum.defvjp(_einsum_forward, _einsum_backward)


def matmul(
    config: ModelConfig, equation: str, x: jax.Array, w: nnx.Param | Int8Matrix
) -> jax.Array:
    """Returns the einsum of an activation and a weight, in the activation's dtype.

    The letters name how the operands and the result are split. The weight is cast first, so that
    it is gathered over `fsdp` in the compute type; its gradient is reduced in
    `config.reduce_dtype`.
    """
    if x.shape[0] * x.shape[1] == 1 and x.dtype == jnp.bfloat16 and platform() != "gpu":
        # XLA gives a single row to the vector unit: twice the row goes to the matrix unit.
        return matmul(config, equation, jnp.concatenate([x, x]), w)[:1]
    if isinstance(w, Int8Matrix):
        return _int8_product(equation, x, w)
    if isinstance(w, Transposed):
        return einsum_transposed(equation, x, w[...])
    product: Any = _einsum(equation, config.reduce_dtype, x, w[...])
    return product


def _int8_product(equation: str, x: jax.Array, w: Int8Matrix) -> jax.Array:
    """Returns the einsum with the whole numbers, times each output's scale.

    They are exact in every compute type, travel as they are, and become one as they are multiplied.
    """
    w_dims, y_dims = equation.split(",")[1].split("->")
    values = jax.reshard(w.values[...], activation_spec(w_dims))
    scale = jax.reshard(w.scale[...], activation_spec(output_dims(w_dims)))
    if platform() == "cpu" and is_single_device() and math.prod(x.shape[:2]) <= FEW_ROWS:
        y = einsum_in_blocks(equation, x, values)
    else:
        y = einsum_in_given_order(
            equation, x, values.astype(x.dtype), activation_spec(y_dims), jnp.float32
        )
    return (y * scale).astype(x.dtype)


@jax.named_scope("tok_embeddings")
def embed(config: ModelConfig, table_VD: nnx.Param | Int8Matrix, tokens_BT: jax.Array) -> jax.Array:
    """Returns the rows of the embedding that the tokens name, [B, T, D] in config.dtype."""
    if isinstance(table_VD, Int8Matrix):
        values, scale = (
            jax.reshard(table_VD.values[...], activation_spec("VD")),
            table_VD.scale[...],
        )
        rows_BTD = values.at[tokens_BT].get(out_sharding=activation_spec("BTD"))
        scale_BT = scale.at[tokens_BT].get(out_sharding=activation_spec("BT"))
        return (rows_BTD * scale_BT[..., None]).astype(config.dtype)
    rows: Any = _embed(config.dtype, config.reduce_dtype, table_VD[...], tokens_BT)
    return rows


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _embed(dtype: str, reduce_dtype: str, table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    # A look-up in a table split over fsdp would make the compiler replicate it: gathered first.
    table_VD = gather_weight(table_VD, "VD", dtype)
    if platform() == "cpu" and table_VD.dtype == jnp.bfloat16:
        # XLA's CPU back end would make the whole table float32 first.
        bits_VD = jax.lax.bitcast_convert_type(table_VD, jnp.uint16)
        bits_BTD = bits_VD.at[tokens_BT].get(out_sharding=activation_spec("BTD"))
        return jax.lax.bitcast_convert_type(bits_BTD, jnp.bfloat16)
    return table_VD.at[tokens_BT].get(out_sharding=activation_spec("BTD"))


def _embed_forward(dtype: str, reduce_dtype: str, table_VD: jax.Array, tokens_BT: jax.Array):
    return _embed(dtype, reduce_dtype, table_VD, tokens_BT), (table_VD, tokens_BT)


def _embed_backward(dtype: str, reduce_dtype: str, operands, dx_BTD: jax.Array):
    """Adds up in the table's own type: a common token comes hundreds of times in a batch."""
    table_VD, tokens_BT = operands

    def table_gradient(tokens_BT, dx_BTD):
        size = table_VD.shape[0] // vocab_shards()
        rows_BT = tokens_BT - vocab_shard_start(size)
        rows_BT = jnp.where(rows_BT < 0, size, rows_BT)  # another device's
        d_table_VD = jnp.zeros((size, dx_BTD.shape[-1]), table_VD.dtype)
        d_table_VD = d_table_VD.at[rows_BT].add(dx_BTD.astype(table_VD.dtype), mode="drop")
        return sum_gradient(d_table_VD, "VD", reduce_dtype)

    specs = activation_spec("BT"), activation_spec("BTD")
    mapped = jax.shard_map(
        table_gradient, in_specs=specs, out_specs=weight_spec("VD"), check_vma=False
    )
    return mapped(tokens_BT, dx_BTD), None


_embed.defvjp(_embed_forward, _embed_backward)
