"""LLaMA: the weights (nouns) and the forward pass (verbs).

One letter per dimension, in suffixes, einsums and the sharding table alike: B batch, T query
positions, S key positions, L layers, V vocabulary, D width, N query heads, K key/value heads,
H head size, F feed-forward size. Weights carry Meta's names, with axes [in…, out…].
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from llama_jax.errors import InputError
from llama_jax.family import ModelConfig
from llama_jax.model.attention import attention, cached_attention
from llama_jax.model.cache import Cache, KeysValues, write
from llama_jax.model.linear import embed, matmul, turned, turned_back
from llama_jax.model.pointwise import rms_norm, swiglu
from llama_jax.model.quantize import MATRICES, matrix
from llama_jax.model.remat import keep, rematerialized
from llama_jax.model.rope import rotate, rotation
from llama_jax.model.weights import Weights, summary
from llama_jax.sharding import act, balance, check_mesh, in_balanced_order, in_text_order, weight


def _normal(config: ModelConfig, dims: str, std: float, key: jax.Array) -> Any:
    shape, dtype = config.shape(dims), jnp.dtype(config.param_dtype)
    drawn = std * jax.random.normal(key, shape, dtype, out_sharding=weight(dims))
    return matrix(config, drawn, dims)


def _ones(config: ModelConfig, dims: str) -> nnx.Param:
    return nnx.Param(jnp.ones(config.shape(dims), config.param_dtype, out_sharding=weight(dims)))


class Block(Weights):
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


class Llama(Weights):
    """All weights of a model. `layers` is one Block whose weights have a leading axis L."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        k_embeddings, k_layers, k_output = jax.random.split(key, 3)
        std = config.dim**-0.5
        self.tok_embeddings = _normal(config, "VD", std, k_embeddings)
        layer_keys = jax.random.split(k_layers, config.n_layers)
        self.layers = jax.vmap(partial(Block, config))(layer_keys)
        self.norm = _ones(config, "D")
        self.output = None if config.tied_head else _normal(config, "DV", std, k_output)


class Unrolled(NamedTuple):
    """The weights of a Llama, layer by layer: for inference, where a step reads each of them once.

    XLA's CPU back end copies a layer that it takes out of a stack before it multiplies with it.
    There matrices are `linear.Turned` too: [out…, in…].
    """

    tok_embeddings: nnx.Param
    layers: tuple[Block, ...]
    norm: nnx.Param
    output: nnx.Param | None

    def __repr__(self) -> str:
        return summary(self)


def unrolled(model: Llama) -> Unrolled:
    """Returns a model layer by layer. Its stacked weights are deleted, one after the other.

    At most the largest of them is in memory twice meanwhile.
    """
    stacked, tree = jax.tree.flatten(model.layers)
    apart = []
    for w_L in stacked:
        apart.append([w_L[i] for i in range(len(w_L))])
        jax.block_until_ready(apart[-1])
        w_L.delete()
    layers = tuple(tree.unflatten(weights) for weights in zip(*apart, strict=True))
    turn = jax.jit(turned, static_argnums=1)
    _change_matrices(layers, turn)
    output = None if model.output is None else turn(model.output, "DV")
    return Unrolled(model.tok_embeddings, layers, model.norm, output)


def as_stored(model: Unrolled) -> Unrolled:
    """Returns a model whose matrices have the axes [in…, out…], as in `Llama` and in files."""
    layers = jax.tree.map(lambda leaf: leaf, model.layers)  # other nodes, the same arrays
    _change_matrices(layers, turned_back)
    output = None if model.output is None else turned_back(model.output, "DV")
    return model._replace(layers=layers, output=output)


def _change_matrices(layers: tuple[Block, ...], change: Callable[[Any, str], Any]) -> None:
    for layer in layers:
        for name, dims in MATRICES.items():
            setattr(layer, name, change(getattr(layer, name), dims))


def _norm(config: ModelConfig, name: str, x_BTD: jax.Array, scale_D: nnx.Param) -> jax.Array:
    with jax.named_scope(name):
        return rms_norm(x_BTD, jax.reshard(scale_D[...], act("D")), config.norm_eps)


@jax.named_scope("attention")
def _attend(config: ModelConfig, layer: Block, x_BTD, turn, seen, kept):
    q = matmul(config, "BTD,DNH->BTNH", x_BTD, layer.wq)
    q = keep("query", rotate(q, turn, config.head_dim**-0.5))  # attention wants its scores scaled
    k = keep("key", rotate(matmul(config, "BTD,DKH->BTKH", x_BTD, layer.wk), turn))
    v = keep("value", matmul(config, "BTD,DKH->BTKH", x_BTD, layer.wv))
    if kept is None:
        out = attention(q, k, v, seen.segments_BT, config.attention)
    else:
        kept = write(kept, k, v, seen.positions_BT[:, 0])
        out = cached_attention(q, kept, seen.positions_BT)
    return matmul(config, "BTNH,NHD->BTD", out, layer.wo), kept


@jax.named_scope("feed_forward")
def _feed_forward(config: ModelConfig, layer: Block, x_BTD: jax.Array) -> jax.Array:
    gate_BTF = keep("gate", matmul(config, "BTD,DF->BTF", x_BTD, layer.w1))
    up_BTF = keep("up", matmul(config, "BTD,DF->BTF", x_BTD, layer.w3))
    return matmul(config, "BTF,FD->BTD", swiglu(gate_BTF, up_BTF), layer.w2)


class _Seen(NamedTuple):
    """What decides which keys a query sees: with a cache its position, without one its segment."""

    positions_BT: jax.Array
    segments_BT: jax.Array | None


def hidden_states(
    config: ModelConfig,
    model: Llama | Unrolled,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Returns what the output head reads, [B, T, D] in config.dtype.

    The arguments are those of `forward`. On a mesh that splits sequences, T is in balanced order
    in arguments and result (`sharding.balance`).
    """
    tokens_BT = jax.reshard(tokens_BT, act("BT"))
    if positions_BT is None:
        positions_T = jnp.asarray(in_balanced_order(np.arange(tokens_BT.shape[1])))
        positions_BT = jnp.broadcast_to(positions_T, tokens_BT.shape, out_sharding=act("BT"))
    x_BTD, block = _begin(config, model, tokens_BT, _Seen(positions_BT, segments_BT))
    if isinstance(model, Unrolled):
        for layer in model.layers:
            x_BTD, _ = block(x_BTD, layer)
    else:
        once = rematerialized(config, block)
        x_BTD, _ = jax.lax.scan(once, x_BTD, model.layers, unroll=not config.scan)
    return _norm(config, "norm", x_BTD, model.norm)


def continued(
    config: ModelConfig,
    model: Llama | Unrolled,
    cache: Cache,
    tokens_BT: jax.Array,
    lengths_B: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """Returns `hidden_states` of the next T tokens of each row, and the cache with them.

    Args:
        config: static under `jax.jit`.
        model: weights of that config.
        cache: what the rows' earlier tokens left; T more slots must be free in each row.
        tokens_BT: int32; what stands behind a row's length is not part of its text.
        lengths_B: int32 0 … T, tokens of each row; default: all T.
    """
    tokens_BT = jax.reshard(tokens_BT, act("BT"))
    T = tokens_BT.shape[1]
    positions_BT = cache.used_B[:, None] + jnp.arange(T)
    x_BTD, block = _begin(config, model, tokens_BT, _Seen(positions_BT, None))
    kept = []
    for number, of_layer in enumerate(cache.layers):
        x_BTD, new = block(x_BTD, layer(model, number), of_layer)
        kept.append(new)
    used_B = cache.used_B + (T if lengths_B is None else lengths_B)
    return _norm(config, "norm", x_BTD, model.norm), Cache(tuple(kept), used_B)


def layer(model: Llama | Unrolled, number: int) -> Block:
    """Returns the weights of one layer, of which a stacked model gives a copy."""
    if isinstance(model, Unrolled):
        return model.layers[number]
    return jax.tree.map(lambda w_L: w_L[number], model.layers)


def _begin(config: ModelConfig, model: Llama | Unrolled, tokens_BT, seen: _Seen):
    """Returns the embedded tokens, and the function of one layer."""
    check_mesh(model.norm[...])
    turn = rotation(config, jax.reshard(seen.positions_BT, act("BT")))

    def block(x_BTD: jax.Array, layer: Block, kept: KeysValues | None = None):
        x_BTD = keep("input", x_BTD)
        h = _norm(config, "attention_norm", x_BTD, layer.attention_norm)
        attended, kept = _attend(config, layer, h, turn, seen, kept)
        x_BTD = x_BTD + keep("attended", attended)
        h = _norm(config, "ffn_norm", x_BTD, layer.ffn_norm)
        return x_BTD + _feed_forward(config, layer, h), kept

    return embed(config, model.tok_embeddings, tokens_BT), block


@jax.named_scope("output")
def output_head(config: ModelConfig, model: Llama | Unrolled, x_BTD: jax.Array) -> jax.Array:
    """Returns the logits [B, T, V], float32, of `hidden_states`."""
    if model.output is None:
        logits = matmul(config, "BTD,VD->BTV", x_BTD, model.tok_embeddings)
    else:
        logits = matmul(config, "BTD,DV->BTV", x_BTD, model.output)
    return logits.astype(jnp.float32)


def token_ids(config: ModelConfig, tokens_BT: Any) -> Any:
    """Returns tokens, given as lists or an array, as an array [B, T].

    Raises:
        InputError: they are no such array of whole numbers, or, where their values are known (not
            under `jax.jit`), one is not in the vocabulary.
    """
    try:
        tokens_BT = _array(tokens_BT)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the tokens are no array [B, T]: give rows of one length ({str(error)[:100]})"
        ) from error
    if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise InputError(
            f"the tokens must be whole numbers [B, T], not {tokens_BT.dtype}"
            f" {list(tokens_BT.shape)}: give one row of ids for each text"
        )
    if isinstance(tokens_BT, Tracer) or not getattr(tokens_BT, "is_fully_addressable", 1):
        return tokens_BT
    ids = np.asarray(tokens_BT)
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    if outside.size:
        raise InputError(
            f"the token {outside[0]} is not in the vocabulary: ids are 0 to {config.vocab_size - 1}"
        )
    return tokens_BT.astype(np.int32)


def _array(x: Any) -> Any:
    """Returns lists of numbers, or of what `jax.jit` makes of these, as an array."""
    if isinstance(x, jax.Array | np.ndarray):
        return x
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(x))
    return jnp.asarray(x) if traced else np.asarray(x)


def forward(
    config: ModelConfig,
    model: Llama | Unrolled,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Returns the logits [B, T, V] float32 of the next token.

    >>> tokens_BT = np.array([tokenizer.encode("The capital of France is P", bos=True)])
    >>> logits_BTV = jax.jit(lj.forward, static_argnums=0)(config, model, tokens_BT)
    >>> likeliest = np.asarray(logits_BTV)[0, -1].argmax()
    >>> tokenizer.decode([*tokens_BT[0], likeliest])
    'The capital of France is Pa'

    Args:
        config: static under `jax.jit`.
        model: weights of that config.
        tokens_BT: int32 token ids in 0 … V-1.
        positions_BT: int32 position of each token in its own text; default 0, 1, …
        segments_BT: int32 number of each token's text; tokens of different segments never see
            each other. Default: all one text.

    Lists of numbers do as well as arrays.

    Raises:
        InputError: the tokens are no such array, or, where their values are known (not under
            `jax.jit`), one is not in the vocabulary; or the model lies on another mesh.
    """
    tokens_BT = balance(token_ids(config, tokens_BT))
    positions_BT = None if positions_BT is None else balance(_array(positions_BT))
    segments_BT = None if segments_BT is None else balance(_array(segments_BT))
    x_BTD = hidden_states(config, model, tokens_BT, positions_BT, segments_BT)
    logits_BSV = jax.reshard(output_head(config, model, x_BTD), act("BSV"))
    return in_text_order(logits_BSV)
