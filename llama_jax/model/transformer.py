"""LLaMA: the weights (nouns) and the forward pass (verbs).

One letter per dimension, in suffixes, einsums and the sharding table alike: B batch, T query
positions, S key positions, L layers, V vocabulary, D width, N query heads, K key/value heads,
H head size, F feed-forward size. Weights carry Meta's names, with axes [in…, out…].
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.family import ModelConfig
from llama_jax.model.attention import attention, cached_attention
from llama_jax.model.cache import Cache
from llama_jax.model.linear import embed, matmul
from llama_jax.model.pointwise import rms_norm, swiglu
from llama_jax.model.quantize import matrix
from llama_jax.model.remat import keep, rematerialized
from llama_jax.model.rope import rotate, rotation
from llama_jax.sharding import act, balance, in_balanced_order, in_text_order, weight


def _normal(config: ModelConfig, dims: str, std: float, key: jax.Array) -> Any:
    shape, dtype = config.shape(dims), jnp.dtype(config.param_dtype)
    drawn = std * jax.random.normal(key, shape, dtype, out_sharding=weight(dims))
    return matrix(config, drawn, dims)


def _ones(config: ModelConfig, dims: str) -> nnx.Param:
    return nnx.Param(jnp.ones(config.shape(dims), config.param_dtype, out_sharding=weight(dims)))


class Block(nnx.Module):
    """The weights of one layer, or of all layers stacked along a leading L.

    Drawn from a normal distribution of deviation fan_in^-1/2; the two that write to the residual
    stream (wo, w2) are (2L)^-1/2 smaller, so that its size does not grow with depth (GPT-2's
    rule). LLaMA's paper does not state its own.
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


class Llama(nnx.Module):
    """All weights of a model. `layers` is one Block whose weights have a leading axis L."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        k_embeddings, k_layers, k_output = jax.random.split(key, 3)
        std = config.dim**-0.5
        self.tok_embeddings = _normal(config, "VD", std, k_embeddings)
        layer_keys = jax.random.split(k_layers, config.n_layers)
        self.layers = jax.vmap(partial(Block, config))(layer_keys)
        self.norm = _ones(config, "D")
        self.output = None if config.tied_head else _normal(config, "DV", std, k_output)


def _norm(config: ModelConfig, x_BTD: jax.Array, scale_D: nnx.Param) -> jax.Array:
    return rms_norm(x_BTD, jax.reshard(scale_D[...], act("D")), config.norm_eps)


def _attend(config: ModelConfig, layer: Block, x_BTD, turn, segments_BT, cache, number):
    q = matmul(config, "BTD,DNH->BTNH", x_BTD, layer.wq)
    q = keep("query", rotate(q, turn, config.head_dim**-0.5))  # attention wants its scores scaled
    k = keep("key", rotate(matmul(config, "BTD,DKH->BTKH", x_BTD, layer.wk), turn))
    v = keep("value", matmul(config, "BTD,DKH->BTKH", x_BTD, layer.wv))
    if cache is None:
        out = attention(q, k, v, segments_BT, config.attention)
    else:
        at = (number, 0, cache.used, 0, 0)
        k, v = (jax.reshard(x, act("BSKH")) for x in (k, v))
        k_cache = jax.lax.dynamic_update_slice(cache.k_LBSKH, k[None].astype(k.dtype), at)
        v_cache = jax.lax.dynamic_update_slice(cache.v_LBSKH, v[None].astype(v.dtype), at)
        cache = cache._replace(k_LBSKH=k_cache, v_LBSKH=v_cache)
        k, v = k_cache[number], v_cache[number]
        out = cached_attention(q, k, v, segments_BT, cache.segments_BS, cache.used)
    return matmul(config, "BTNH,NHD->BTD", out, layer.wo), cache


def _feed_forward(config: ModelConfig, layer: Block, x_BTD: jax.Array) -> jax.Array:
    gate_BTF = keep("gate", matmul(config, "BTD,DF->BTF", x_BTD, layer.w1))
    up_BTF = keep("up", matmul(config, "BTD,DF->BTF", x_BTD, layer.w3))
    return matmul(config, "BTF,FD->BTD", swiglu(gate_BTF, up_BTF), layer.w2)


def hidden_states(
    config: ModelConfig,
    model: Llama,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    cache: Cache | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Returns what the output head reads, [B, T, D] in config.dtype, and the cache after T more.

    The arguments are those of `forward`. On a mesh that splits sequences, T is in balanced order
    in arguments and result (`sharding.balance`).
    """
    tokens_BT = jax.reshard(tokens_BT, act("BT"))
    if positions_BT is None:
        start = 0 if cache is None else cache.used
        positions_T = start + jnp.asarray(in_balanced_order(np.arange(tokens_BT.shape[1])))
        positions_BT = jnp.broadcast_to(positions_T, tokens_BT.shape, out_sharding=act("BT"))
    if cache is not None:
        if segments_BT is None:
            segments_BT = jnp.ones_like(tokens_BT)
        new = jax.reshard(segments_BT, act("BS"))
        written = jax.lax.dynamic_update_slice(cache.segments_BS, new, (0, cache.used))
        cache = cache._replace(segments_BS=written)
    x_BTD = embed(config, model.tok_embeddings, tokens_BT)
    turn = rotation(config, jax.reshard(positions_BT, act("BT")))

    def block(carry, layer_and_number):
        x_BTD, cache = carry
        x_BTD = keep("input", x_BTD)
        layer, number = layer_and_number
        h = _norm(config, x_BTD, layer.attention_norm)
        attended, cache = _attend(config, layer, h, turn, segments_BT, cache, number)
        x_BTD = x_BTD + keep("attended", attended)
        h = _norm(config, x_BTD, layer.ffn_norm)
        return (x_BTD + _feed_forward(config, layer, h), cache), None

    layers = (model.layers, jnp.arange(config.n_layers))
    (x_BTD, cache), _ = jax.lax.scan(
        rematerialized(config, block), (x_BTD, cache), layers, unroll=not config.scan
    )
    if cache is not None:
        cache = cache._replace(used=cache.used + tokens_BT.shape[1])
    return _norm(config, x_BTD, model.norm), cache


def output_head(config: ModelConfig, model: Llama, x_BTD: jax.Array) -> jax.Array:
    """Returns the logits [B, T, V], float32, of `hidden_states`."""
    if model.output is None:
        logits = matmul(config, "BTD,VD->BTV", x_BTD, model.tok_embeddings)
    else:
        logits = matmul(config, "BTD,DV->BTV", x_BTD, model.output)
    return logits.astype(jnp.float32)


def forward(
    config: ModelConfig,
    model: Llama,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    cache: Cache | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Returns the logits [B, T, V] float32 of the next token, and the cache after these T.

    Args:
        config: static under `jax.jit`.
        model: weights of that config.
        tokens_BT: int32 token ids in 0 … V-1.
        positions_BT: int32 position of each token in its own text; default 0, 1, … (with a
            cache, from its index on).
        segments_BT: int32 number of each token's text; tokens of different segments never see
            each other, and 0 stands for padding. Default: all one text.
        cache: keys and values of earlier tokens, to be continued; it needs T free slots.
    """
    if cache is None:
        tokens_BT = balance(tokens_BT)
        positions_BT = None if positions_BT is None else balance(positions_BT)
        segments_BT = None if segments_BT is None else balance(segments_BT)
    x_BTD, cache = hidden_states(config, model, tokens_BT, positions_BT, segments_BT, cache)
    logits_BSV = jax.reshard(output_head(config, model, x_BTD), act("BSV"))
    return (in_text_order(logits_BSV) if cache is None else logits_BSV), cache
