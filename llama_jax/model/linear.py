"""Products of activations and weights: gathers the weights, reduces their gradients over the mesh.

`matmul` is the one function for every kind of weight: an nnx.Param; an `Int8Matrix` or a
`Transposed`, which have no gradient; or an `Adapted`, one of these with a low-rank pair.
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
    einsum_float32,
    einsum_in_given_order,
    einsum_int8,
)
from llama_jax.model.linear_transposed import Transposed, einsum_transposed, transposed_dims
from llama_jax.model.lora import Adapted, low_rank_dims
from llama_jax.model.quantize import Int8Matrix, output_dims, remove_offset
from llama_jax.parallel.collectives import (
    gather_weight,
    shard_sequence,
    sum_gradient,
    sum_over_shards,
    vocab_shard_start,
)
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
        # One letter M for B and T: the compiler would sum over two letters one after the other.
        x, dy = (a.reshape(-1, *a.shape[2:]) for a in (x, dy))
        # On 64 TPU chips the compiler reduce-scatters a gradient [F, D] (w2), but all-reduces one
        # [D, F] (w1, w3): compute the latter as [F, D] too.
        dims = "FD" if w_dims == "DF" and platform() == "tpu" else w_dims
        equation = f"M{x_dims[2:]},M{y_dims[2:]}->{dims}"
        dw = sum_gradient(einsum_float32(equation, x, dy).astype(w.dtype), dims, reduce_dtype)
        return dw if dims == w_dims else dw.T

    specs = activation_spec(x_dims), activation_spec(y_dims)
    mapped = jax.shard_map(
        weight_gradient, in_specs=specs, out_specs=weight_spec(w_dims), check_vma=False
    )
    return dx, mapped(jax.reshard(x, specs[0]), dy)


# Same gradients as jnp.einsum, written so that no operand needs a transpose. For the weight JAX
# derives (dyᵀx)ᵀ with separate sums over B and T; for each of the two, XLA:CPU materializes a
# transposed operand. The shard_map fixes where the gradient is reduced over devices.
_einsum.defvjp(_einsum_forward, _einsum_backward)


def matmul(
    config: ModelConfig, equation: str, x: jax.Array, w: nnx.Param | Int8Matrix | Adapted
) -> jax.Array:
    """Returns the einsum of an activation and a weight, in the activation's dtype.

    The letters of `equation` determine the sharding of the operands and of the result. The weight
    is cast before it is gathered over `fsdp`, so that it is gathered in the compute dtype; its
    gradient is reduced in `config.reduce_dtype`.
    """
    if isinstance(w, Adapted):
        return matmul(config, equation, x, w.base) + _low_rank_product(config, equation, x, w)
    is_one_row = x.shape[0] * x.shape[1] == 1 and x.dtype == jnp.bfloat16
    in_digits = platform() == "cpu" and isinstance(w, Int8Matrix)  # has a row for each digit
    if is_one_row and platform() != "gpu" and not in_digits:
        # XLA computes a product with one row on the vector unit, with two on the matrix unit.
        return matmul(config, equation, jnp.concatenate([x, x]), w)[:1]
    if isinstance(w, Int8Matrix):
        return _int8_product(equation, x, w)
    if isinstance(w, Transposed):
        return einsum_transposed(equation, x, w[...])
    product: Any = _einsum(equation, config.reduce_dtype, x, w[...])
    return product


@jax.named_scope("lora")
def _low_rank_product(config: ModelConfig, equation: str, x: jax.Array, w: Adapted) -> jax.Array:
    """Returns s·(xA)B, with dropout on the input of A (LoRA, arXiv 2106.09685)."""
    x_dims, w_dims, y_dims = equation.replace("->", ",").split(",")
    a_dims, b_dims = low_rank_dims(w_dims)
    r_dims = f"{x_dims[:2]}R"
    if w.key is not None:
        retained = _random_mask(w.key, 1 - w.dropout, x.shape, x_dims)
        x = jnp.where(retained, x / (1 - w.dropout), 0)
    h = matmul(config, f"{x_dims},{a_dims}->{r_dims}", x, w.a)
    return matmul(config, f"{r_dims},{b_dims}->{y_dims}", w.scale * h, w.b)


def _random_mask(key: jax.Array, p: float, shape: tuple[int, ...], x_dims: str) -> jax.Array:
    """Returns a random mask of activations, True with probability `p`; the same on every mesh."""
    text_dims = x_dims.replace("T", "S")  # S: complete sequences
    mask = jax.random.bernoulli(key, p, shape, out_sharding=activation_spec(text_dims))
    return shard_sequence(mask, x_dims)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _int8_product(equation: str, x: jax.Array, w: Int8Matrix) -> jax.Array:
    """Returns the einsum with the int8 values, multiplied by the scale of each output channel.

    The values are gathered as int8 and cast to the compute dtype in the product, which represents
    them exactly. With few rows on a CPU the activations become int8 digits instead.
    """
    x_dims, w_dims, y_dims = equation.replace("->", ",").split(",")
    values, scale, dims = _gather_int8(w, w_dims)
    equation = f"{x_dims},{dims}->{y_dims}"
    if platform() == "cpu" and is_single_device() and math.prod(x.shape[:2]) <= FEW_ROWS:
        return (einsum_int8(equation, x, values) * scale).astype(x.dtype)
    if platform() == "tpu":
        return _scale_before_sum(equation, x, values, scale)
    values = remove_offset(values)
    y = einsum_in_given_order(
        equation, x, values.astype(x.dtype), activation_spec(y_dims), jnp.float32
    )
    return (y * scale).astype(x.dtype)


def _scale_before_sum(
    equation: str, x: jax.Array, values: jax.Array, scale: jax.Array
) -> jax.Array:
    """Returns the scaled product; devices that have terms of one sum exchange them in x's dtype."""
    x_dims, w_dims, y_dims = equation.replace("->", ",").split(",")

    def local(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
        y = jnp.einsum(equation, x, values.astype(x.dtype), preferred_element_type=jnp.float32)
        return sum_over_shards((y * scale).astype(x.dtype), set(x_dims) - set(y_dims))

    scale_dims = "".join(letter for letter in w_dims if letter in y_dims)
    specs = [activation_spec(dims) for dims in (x_dims, w_dims, scale_dims)]
    mapped = jax.shard_map(
        local, in_specs=tuple(specs), out_specs=activation_spec(y_dims), check_vma=False
    )
    return mapped(jax.reshard(x, specs[0]), values, scale)


def _gather_int8(w: Int8Matrix, dims: str) -> tuple[jax.Array, jax.Array, str]:
    """Returns the values, the scales, and the letters of the values' axes as they are stored."""
    stored = transposed_dims(dims) if isinstance(w.values, Transposed) else dims
    values = jax.reshard(w.values[...], activation_spec(stored))
    return values, jax.reshard(w.scale[...], activation_spec(output_dims(dims))), stored


def _int8_forward(equation: str, x: jax.Array, w: Int8Matrix):
    return _int8_product(equation, x, w), w


def _int8_backward(equation: str, w: Int8Matrix, dy: jax.Array):
    """Returns the gradient of the activation; an int8 matrix has none."""
    x_dims, w_dims, y_dims = equation.replace("->", ",").split(",")
    values, scale, stored = _gather_int8(w, w_dims)
    dx = einsum_in_given_order(
        f"{y_dims},{stored}->{x_dims}",
        (dy * scale).astype(dy.dtype),
        remove_offset(values).astype(dy.dtype),
        activation_spec(x_dims),
    )
    return dx, None


_int8_product.defvjp(_int8_forward, _int8_backward)


@jax.named_scope("tok_embeddings")
def embed(config: ModelConfig, table_VD: nnx.Param | Int8Matrix, tokens_BT: jax.Array) -> jax.Array:
    """Returns the embedding of each token, [B, T, D] in config.dtype."""
    if isinstance(table_VD, Int8Matrix):
        values, scale = (
            jax.reshard(table_VD.values[...], activation_spec("VD")),
            table_VD.scale[...],
        )
        rows_BTD = remove_offset(values.at[tokens_BT].get(out_sharding=activation_spec("BTD")))
        scale_BT = scale.at[tokens_BT].get(out_sharding=activation_spec("BT"))
        return (rows_BTD * scale_BT[..., None]).astype(config.dtype)
    rows: Any = _embed(config.dtype, config.reduce_dtype, table_VD[...], tokens_BT)
    return rows


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _embed(dtype: str, reduce_dtype: str, table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    # For a lookup in a table sharded over fsdp the compiler would replicate the table, so gather it
    # explicitly.
    table_VD = gather_weight(table_VD, "VD", dtype)
    if platform() == "cpu" and table_VD.dtype == jnp.bfloat16:
        # XLA:CPU would convert the complete bfloat16 table to float32 first; not so for uint16.
        bits_VD = jax.lax.bitcast_convert_type(table_VD, jnp.uint16)
        bits_BTD = bits_VD.at[tokens_BT].get(out_sharding=activation_spec("BTD"))
        return jax.lax.bitcast_convert_type(bits_BTD, jnp.bfloat16)
    return table_VD.at[tokens_BT].get(out_sharding=activation_spec("BTD"))


def _embed_forward(dtype: str, reduce_dtype: str, table_VD: jax.Array, tokens_BT: jax.Array):
    return _embed(dtype, reduce_dtype, table_VD, tokens_BT), (table_VD, tokens_BT)


def _embed_backward(dtype: str, reduce_dtype: str, operands, dx_BTD: jax.Array):
    """Accumulates in the table's dtype: a common token occurs hundreds of times in a batch."""
    table_VD, tokens_BT = operands

    def table_gradient(tokens_BT, dx_BTD):
        size = table_VD.shape[0] // vocab_shards()
        rows_BT = tokens_BT - vocab_shard_start(size)
        # Rows of other devices get an index out of range, which mode="drop" ignores.
        rows_BT = jnp.where(rows_BT < 0, size, rows_BT)
        d_table_VD = jnp.zeros((size, dx_BTD.shape[-1]), table_VD.dtype)
        d_table_VD = d_table_VD.at[rows_BT].add(dx_BTD.astype(table_VD.dtype), mode="drop")
        return sum_gradient(d_table_VD, "VD", reduce_dtype)

    specs = activation_spec("BT"), activation_spec("BTD")
    mapped = jax.shard_map(
        table_gradient, in_specs=specs, out_specs=weight_spec("VD"), check_vma=False
    )
    return mapped(tokens_BT, dx_BTD), None


_embed.defvjp(_embed_forward, _embed_backward)
