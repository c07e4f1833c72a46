"""The weights of a LLaMA, as modules without methods that compute.

`Llama` stacks its layers along a leading axis L, for `jax.lax.scan` in training; `UnstackedLlama`
has one `Block` per layer, for inference. `transformer.forward` accepts both.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.model.linear_transposed import restore_weight, transpose_weight
from llama_jax.model.quantize import MATRIX_DIMS, Int8Matrix, matrix_param
from llama_jax.model.summary import WeightsModule, summarize_weights
from llama_jax.parallel.mesh import platform
from llama_jax.parallel.sharding import weight_spec
from llama_jax.runtime.program_store import stored_jit


def _normal(config: ModelConfig, dims: str, std: float, key: jax.Array) -> Any:
    shape, dtype = config.shape(dims), jnp.dtype(config.param_dtype)
    w = std * jax.random.normal(key, shape, dtype, out_sharding=weight_spec(dims))
    return matrix_param(config, w, dims)


def _ones(config: ModelConfig, dims: str) -> nnx.Param:
    return nnx.Param(
        jnp.ones(config.shape(dims), config.param_dtype, out_sharding=weight_spec(dims))
    )


class Block(WeightsModule):
    """The weights of one layer, or of all layers stacked along a leading L.

    Initial matrices are normal with standard deviation fan_in^-1/2, times (2L)^-1/2 for wo and w2,
    which add to the residual stream, so that its size does not grow with depth (GPT-2's rule).
    LLaMA's paper does not state its initialization.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        D, F, NH = config.dim, config.hidden_dim, config.n_heads * config.head_dim
        k = jax.random.split(key, 7)
        residual = (2 * config.n_layers) ** -0.5
        self.attention_norm = _ones(config, "D")
        self.wq = _normal(config, "DNH", D**-0.5, k[0])
        self.wk = _normal(config, "DKH", D**-0.5, k[1])
        self.wv = _normal(config, "DKH", D**-0.5, k[2])
        self.wo = _normal(config, "NHD", residual * NH**-0.5, k[3])
        self.ffn_norm = _ones(config, "D")
        self.w1 = _normal(config, "DF", D**-0.5, k[4])
        self.w3 = _normal(config, "DF", D**-0.5, k[5])
        self.w2 = _normal(config, "FD", residual * F**-0.5, k[6])


class Llama(WeightsModule):
    """All weights of a model. `layers` is one Block in which every weight has a leading axis L."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        k_embeddings, k_layers, k_output = jax.random.split(key, 3)
        std = config.dim**-0.5
        self.tok_embeddings = _normal(config, "VD", std, k_embeddings)
        layer_keys = jax.random.split(k_layers, config.n_layers)
        self.layers = jax.vmap(partial(Block, config))(layer_keys)
        self.norm = _ones(config, "D")
        self.output = None if config.tied_head else _normal(config, "DV", std, k_output)


class UnstackedLlama(NamedTuple):
    """All weights of a model, with one Block per layer, for inference.

    A decode step uses each weight once, and XLA:CPU copies a layer that it slices from a stack.
    Some matrices are also `linear_transposed.Transposed`, [out…, in…].
    """

    tok_embeddings: nnx.Param
    layers: tuple[Block, ...]
    norm: nnx.Param
    output: nnx.Param | None

    def __repr__(self) -> str:
        return summarize_weights(self)


def unstack_layers(model: Llama) -> UnstackedLlama:
    """Returns the model of `decode_layout` with one Block per layer; deletes the stacked weights.

    It unstacks and deletes one weight after the other, so that at most the largest is in memory
    twice.
    """
    unstacked = {}
    for name in ("attention_norm", "ffn_norm", *MATRIX_DIMS):
        w_L = getattr(model.layers, name)
        unstacked[name] = jax.block_until_ready(_split(w_L, MATRIX_DIMS.get(name)))
        for leaf in jax.tree.leaves(w_L):
            leaf.delete()
    layers = []
    for i in range(len(unstacked["attention_norm"])):
        layers.append(jax.tree.map(lambda leaf: leaf, model.layers))
        for name, weights in unstacked.items():
            setattr(layers[-1], name, weights[i])
    table = _to_decode_layout(model.tok_embeddings, "VD")
    output = None if model.output is None else _to_decode_layout(model.output, "DV")
    return UnstackedLlama(table, tuple(layers), model.norm, output)


def decode_layout(model: UnstackedLlama) -> UnstackedLlama:
    """Returns the model with each matrix in the layout that decodes fastest on this platform.

    The layers keep their modules, so that each matrix is freed when it is replaced.
    """
    return _map_matrices(model, _to_decode_layout)


def _to_decode_layout(w: Any, dims: str) -> Any:
    if dims == "VD" and not (isinstance(w, Int8Matrix) and platform() == "cpu"):
        return w  # the compiled function would return a copy of it
    return _transpose(w, dims)


_transpose: Any = stored_jit(static_argnums=1)(transpose_weight)


@stored_jit(static_argnums=1)
def _split(w_L: Any, dims: str | None) -> list[Any]:
    """Returns the weight of each layer, a matrix as `decode_layout` stores it."""
    n_layers = len(jax.tree.leaves(w_L)[0])
    layers = [jax.tree.map(itemgetter(i), w_L) for i in range(n_layers)]
    return [transpose_weight(w, dims) for w in layers] if dims else layers


def restore_layout(model: UnstackedLlama) -> UnstackedLlama:
    """Returns the model with matrices [in…, out…], as in `Llama` and in files."""
    layers = jax.tree.map(lambda leaf: leaf, model.layers)  # new modules, the same arrays
    return _map_matrices(model._replace(layers=layers), restore_weight)


def _map_matrices(model: UnstackedLlama, function: Callable[[Any, str], Any]) -> UnstackedLlama:
    """Replaces each matrix w of the layers, and returns the model with function(w, dims)."""
    for layer in model.layers:
        for name, dims in MATRIX_DIMS.items():
            setattr(layer, name, function(getattr(layer, name), dims))
    table = function(model.tok_embeddings, "VD")
    output = None if model.output is None else function(model.output, "DV")
    return model._replace(tok_embeddings=table, output=output)


def layer_weights(model: Llama | UnstackedLlama, number: int) -> Block:
    """Returns the weights of one layer; from a stacked model a copy."""
    if isinstance(model, UnstackedLlama):
        return model.layers[number]
    return jax.tree.map(lambda w_L: w_L[number], model.layers)


def check_not_quantized(config: ModelConfig) -> None:
    """Checks that a model is not quantized.

    Raises:
        InputError: it is.
    """
    if config.quantized != "none":
        raise InputError(
            f"the model is already quantized to {config.quantized}: quantize the original instead"
        )


def quantize_model(config: ModelConfig, model: Llama) -> tuple[ModelConfig, Llama]:
    """Returns configuration and model with every matrix as an `Int8Matrix`; the norms are shared.

    Quantizes one matrix after the other, on the current mesh. `model` stays as it is, so both
    models are in memory until the caller drops it.

    Raises:
        InputError: the model is already quantized.
    """
    check_not_quantized(config)
    config = replace(config, quantized="int8")
    quantize = jax.jit(partial(matrix_param, config), static_argnames="dims")
    model = jax.tree.map(lambda leaf: leaf, model)  # new modules, the same arrays
    model.tok_embeddings = quantize(model.tok_embeddings[...], dims="VD")
    if model.output is not None:
        model.output = quantize(model.output[...], dims="DV")
    for name, dims in MATRIX_DIMS.items():
        setattr(model.layers, name, quantize(getattr(model.layers, name)[...], dims=dims))
    return config, model
