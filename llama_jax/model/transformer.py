"""LLaMA: the forward pass, as pure functions of the weights in `weights.py`.

One letter per dimension, in suffixes, einsums and the sharding table alike: B batch, T query
positions, S key positions, L layers, V vocabulary, D width, N query heads, K key/value heads,
H head size, F feed-forward size. Weights carry Meta's names, with axes [in…, out…].
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.model.attention import attention, cached_attention
from llama_jax.model.cache import KVCache, LayerCache, write_cache
from llama_jax.model.layers import rms_norm, swiglu
from llama_jax.model.linear import embed, matmul
from llama_jax.model.remat import apply_remat, save_for_backward
from llama_jax.model.rope import apply_rope, rope_sin_cos
from llama_jax.model.weights import Block, Llama, UnstackedLlama, layer_weights
from llama_jax.parallel.collectives import shard_sequence, to_balanced_order, to_text_order
from llama_jax.parallel.mesh import check_current_mesh
from llama_jax.parallel.sharding import activation_spec


def _norm(config: ModelConfig, name: str, x_BTD: jax.Array, scale_D: nnx.Param) -> jax.Array:
    with jax.named_scope(name):
        return rms_norm(x_BTD, jax.reshard(scale_D[...], activation_spec("D")), config.norm_eps)


@jax.named_scope("attention")
def _attend(config: ModelConfig, layer: Block, x_BTD, turn, seen, kept):
    q = matmul(config, "BTD,DNH->BTNH", x_BTD, layer.wq)
    q = save_for_backward(
        "query", apply_rope(q, turn, config.head_dim**-0.5)
    )  # attention wants its scores scaled
    k = save_for_backward("key", apply_rope(matmul(config, "BTD,DKH->BTKH", x_BTD, layer.wk), turn))
    v = save_for_backward("value", matmul(config, "BTD,DKH->BTKH", x_BTD, layer.wv))
    if kept is None:
        out = attention(q, k, v, seen.segments_BT, config.attention)
    else:
        kept = write_cache(kept, k, v, seen.positions_BT[:, 0])
        out = cached_attention(q, kept, seen.positions_BT)
    return matmul(config, "BTNH,NHD->BTD", out, layer.wo), kept


@jax.named_scope("feed_forward")
def _feed_forward(config: ModelConfig, layer: Block, x_BTD: jax.Array) -> jax.Array:
    gate_BTF = save_for_backward("gate", matmul(config, "BTD,DF->BTF", x_BTD, layer.w1))
    up_BTF = save_for_backward("up", matmul(config, "BTD,DF->BTF", x_BTD, layer.w3))
    return matmul(config, "BTF,FD->BTD", swiglu(gate_BTF, up_BTF), layer.w2)


class _Seen(NamedTuple):
    """What decides which keys a query sees: with a cache its position, without one its segment."""

    positions_BT: jax.Array
    segments_BT: jax.Array | None


def hidden_states(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Returns what the output head reads, [B, T, D] in config.dtype.

    The arguments are those of `forward`. On a mesh that splits sequences, T is in balanced order
    in arguments and result (`collectives.shard_sequence`).
    """
    tokens_BT = jax.reshard(tokens_BT, activation_spec("BT"))
    if positions_BT is None:
        positions_T = jnp.asarray(to_balanced_order(np.arange(tokens_BT.shape[1])))
        positions_BT = jnp.broadcast_to(
            positions_T, tokens_BT.shape, out_sharding=activation_spec("BT")
        )
    x_BTD, block = _begin(config, model, tokens_BT, _Seen(positions_BT, segments_BT))
    if isinstance(model, UnstackedLlama):
        for layer in model.layers:
            x_BTD, _ = block(x_BTD, layer)
    else:
        once = apply_remat(config, block)
        x_BTD, _ = jax.lax.scan(once, x_BTD, model.layers, unroll=not config.scan)
    return _norm(config, "norm", x_BTD, model.norm)


def forward_cached(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    cache: KVCache,
    tokens_BT: jax.Array,
    lengths_B: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Returns `hidden_states` of the next T tokens of each row, and the cache with them.

    Args:
        config: static under `jax.jit`.
        model: weights of that config.
        cache: what the rows' earlier tokens left; T more slots must be free in each row.
        tokens_BT: int32; what stands behind a row's length is not part of its text.
        lengths_B: int32 0 … T, tokens of each row; default: all T.
    """
    tokens_BT = jax.reshard(tokens_BT, activation_spec("BT"))
    T = tokens_BT.shape[1]
    positions_BT = cache.used_B[:, None] + jnp.arange(T)
    x_BTD, block = _begin(config, model, tokens_BT, _Seen(positions_BT, None))
    kept = []
    for number, of_layer in enumerate(cache.layers):
        x_BTD, new = block(x_BTD, layer_weights(model, number), of_layer)
        kept.append(new)
    used_B = cache.used_B + (T if lengths_B is None else lengths_B)
    return _norm(config, "norm", x_BTD, model.norm), KVCache(tuple(kept), used_B)


def _begin(config: ModelConfig, model: Llama | UnstackedLlama, tokens_BT, seen: _Seen):
    """Returns the embedded tokens, and the function of one layer."""
    check_current_mesh(model.norm[...])
    turn = rope_sin_cos(config, jax.reshard(seen.positions_BT, activation_spec("BT")))

    def block(x_BTD: jax.Array, layer: Block, kept: LayerCache | None = None):
        x_BTD = save_for_backward("input", x_BTD)
        h = _norm(config, "attention_norm", x_BTD, layer.attention_norm)
        attended, kept = _attend(config, layer, h, turn, seen, kept)
        x_BTD = x_BTD + save_for_backward("attended", attended)
        h = _norm(config, "ffn_norm", x_BTD, layer.ffn_norm)
        return x_BTD + _feed_forward(config, layer, h), kept

    return embed(config, model.tok_embeddings, tokens_BT), block


@jax.named_scope("output")
def output_head(config: ModelConfig, model: Llama | UnstackedLlama, x_BTD: jax.Array) -> jax.Array:
    """Returns the logits [B, T, V], float32, of `hidden_states`."""
    if model.output is None:
        logits = matmul(config, "BTD,VD->BTV", x_BTD, model.tok_embeddings)
    else:
        logits = matmul(config, "BTD,DV->BTV", x_BTD, model.output)
    return logits.astype(jnp.float32)


def as_token_array(config: ModelConfig, tokens_BT: Any) -> Any:
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
    model: Llama | UnstackedLlama,
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
    tokens_BT = shard_sequence(as_token_array(config, tokens_BT))
    positions_BT = None if positions_BT is None else shard_sequence(_array(positions_BT))
    segments_BT = None if segments_BT is None else shard_sequence(_array(segments_BT))
    x_BTD = hidden_states(config, model, tokens_BT, positions_BT, segments_BT)
    logits_BSV = jax.reshard(output_head(config, model, x_BTD), activation_spec("BSV"))
    return to_text_order(logits_BSV)
