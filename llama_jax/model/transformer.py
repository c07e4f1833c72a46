"""LLaMA's forward pass, as pure functions of the weights in `weights.py`.

    x = tok_embeddings[tokens]
    in each layer:
        h = rms_norm(x, attention_norm)
        x = x + wo · attention(rope(wq · h), rope(wk · h), wv · h)
        h = rms_norm(x, ffn_norm)
        x = x + w2 · (silu(w1 · h) * (w3 · h))
    logits = output · rms_norm(x, norm)

One letter names a dimension, in suffixes, in einsum equations and in the sharding tables:

    B  batch                  L  layers             N  query heads
    T  query positions        V  vocabulary         K  key/value heads
    S  key positions          D  width              H  head size
    R  LoRA rank              F  feed-forward size

Weights have Meta's names and the axes [in…, out…]. Papers: LLaMA (arXiv 2302.13971), rotary
embeddings (2104.09864), grouped-query attention (2305.13245), SwiGLU (2002.05202).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.config.model import ModelConfig
from llama_jax.model.attention import attention, update_and_attend
from llama_jax.model.cache import KVCache, LayerCache
from llama_jax.model.inputs import as_array, as_token_array
from llama_jax.model.layers import rms_norm, swiglu
from llama_jax.model.linear import embed, matmul
from llama_jax.model.remat import apply_remat, save_for_backward
from llama_jax.model.rope import apply_rope, rope_sin_cos
from llama_jax.model.weights import Block, Llama, UnstackedLlama, layer_weights
from llama_jax.parallel.collectives import shard_sequence, to_balanced_order, to_text_order
from llama_jax.parallel.head_copies import copies_of_head
from llama_jax.parallel.mesh import check_current_mesh
from llama_jax.parallel.sharding import activation_spec


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
        segments_BT: int32 number of each token's text; a token attends only to tokens of its own
            segment. Default: each row is one text.

    Lists of numbers are accepted instead of arrays.

    Raises:
        InputError: the tokens are not an integer array [B, T]; an id is not in the vocabulary
            (checked if the values are known: not under `jax.jit`); or the model is on another mesh
            than the current one.
    """
    tokens_BT = shard_sequence(as_token_array(config, tokens_BT))
    positions_BT = None if positions_BT is None else shard_sequence(as_array(positions_BT))
    segments_BT = None if segments_BT is None else shard_sequence(as_array(segments_BT))
    x_BTD = hidden_states(config, model, tokens_BT, positions_BT, segments_BT)
    logits_BSV = jax.reshard(output_head(config, model, x_BTD), activation_spec("BSV"))
    return to_text_order(logits_BSV)


class _Inputs(NamedTuple):
    """The inputs that all layers share."""

    sin_cos: tuple[jax.Array, jax.Array]  # of the rotary embedding, [B, T, H/2] each
    positions_BT: jax.Array
    segments_BT: jax.Array | None = None  # without a KV cache; None: each row is one text
    ends_BT: jax.Array | None = None  # without a KV cache; of rows that are prefix trees
    used_B: jax.Array | None = None  # of a KV cache
    pages_BP: jax.Array | None = None  # of a KV cache in pages


def hidden_states(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    ends_BT: jax.Array | None = None,
) -> jax.Array:
    """Returns the output of the last norm, which is the input of `output_head`.

    The result is [B, T, D] in config.dtype; the arguments are those of `forward`. Rows that are
    prefix trees also have `ends_BT` (see `attention`), and the depth of each token as its position.
    On a mesh that splits sequences, arguments and result have T in balanced order
    (`collectives.shard_sequence`).
    """
    x_BTD, _ = measured_hidden_states(
        config, model, tokens_BT, positions_BT, segments_BT, ends_BT, lambda _: None
    )
    return x_BTD


def measured_hidden_states(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None,
    segments_BT: jax.Array | None,
    ends_BT: jax.Array | None,
    measure: Callable[[jax.Array], Any],
) -> tuple[jax.Array, Any]:
    """Returns `hidden_states`, and the results of `measure` for the output [B, T, D] of each layer.

    These have a leading axis L; None if the layers are not stacked.
    """
    check_current_mesh(model.norm[...])
    tokens_BT = jax.reshard(tokens_BT, activation_spec("BT"))
    if positions_BT is None:
        positions_T = jnp.asarray(to_balanced_order(np.arange(tokens_BT.shape[1])))
        positions_BT = jnp.broadcast_to(
            positions_T, tokens_BT.shape, out_sharding=activation_spec("BT")
        )
    inputs = _Inputs(_sin_cos(config, positions_BT), positions_BT, segments_BT, ends_BT)

    def block(x_BTD: jax.Array, layer: Block):
        x_BTD, _ = _block(config, layer, x_BTD, inputs, None)
        return x_BTD, measure(x_BTD)

    x_BTD, measured = embed(config, model.tok_embeddings, tokens_BT), None
    if isinstance(model, UnstackedLlama):
        for layer in model.layers:
            x_BTD, _ = block(x_BTD, layer)
    else:
        block = apply_remat(config, block)
        x_BTD, measured = jax.lax.scan(block, x_BTD, model.layers, unroll=not config.scan)
    return _norm(config, "norm", x_BTD, model.norm), measured


def forward_cached(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    cache: KVCache,
    tokens_BT: jax.Array,
    lengths_B: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Returns `hidden_states` of each row's next T tokens, and the KV cache with these tokens.

    This is prefill (an empty cache, many tokens) and decode (T = 1).

    Args:
        config: static under `jax.jit`.
        model: weights of that config.
        cache: keys and values of the rows' earlier tokens; each row must have T free slots. With
            pages, a row of length 0 writes to page 0, not to its own pages.
        tokens_BT: int32 token ids; those after a row's length are padding.
        lengths_B: int32 0 … T, number of tokens in each row; default: T.
    """
    check_current_mesh(model.norm[...])
    tokens_BT = jax.reshard(tokens_BT, activation_spec("BT"))
    T = tokens_BT.shape[1]
    positions_BT = cache.used_B[:, None] + jnp.arange(T)
    pages_BP = cache.pages_BP
    if lengths_B is not None:
        # Position 0, so that attention doesn't read the cache of a row that is not active.
        positions_BT = jnp.where(lengths_B[:, None] > 0, positions_BT, 0)
        if pages_BP is not None:
            pages_BP = jnp.where(lengths_B[:, None] > 0, pages_BP, 0)
    sin_cos = _sin_cos(config, positions_BT)
    inputs = _Inputs(sin_cos, positions_BT, used_B=cache.used_B, pages_BP=pages_BP)
    x_BTD = embed(config, model.tok_embeddings, tokens_BT)
    layer_caches = []
    for number, layer_cache in enumerate(cache.layers):
        layer = layer_weights(model, number)
        x_BTD, layer_cache = _block(config, layer, x_BTD, inputs, layer_cache)
        layer_caches.append(layer_cache)
    used_B = cache.used_B + (T if lengths_B is None else lengths_B)
    cache = KVCache(tuple(layer_caches), used_B, cache.pages_BP)
    return _norm(config, "norm", x_BTD, model.norm), cache


def _block(
    config: ModelConfig, layer: Block, x_BTD: jax.Array, inputs: _Inputs, cache: LayerCache | None
) -> tuple[jax.Array, LayerCache | None]:
    """Returns the output of one layer, and its KV cache with the new keys and values."""
    x_BTD = save_for_backward("input", x_BTD)
    h_BTD = _norm(config, "attention_norm", x_BTD, layer.attention_norm)
    attention_BTD, cache = _attention(config, layer, h_BTD, inputs, cache)
    x_BTD = x_BTD + save_for_backward("attention_output", attention_BTD)
    h_BTD = _norm(config, "ffn_norm", x_BTD, layer.ffn_norm)
    return x_BTD + _feed_forward(config, layer, h_BTD), cache


@jax.named_scope("attention")
def _attention(
    config: ModelConfig, layer: Block, x_BTD: jax.Array, inputs: _Inputs, cache: LayerCache | None
) -> tuple[jax.Array, LayerCache | None]:
    q_BTNH = matmul(config, "BTD,DNH->BTNH", x_BTD, layer.wq)
    # `attention` expects q divided by √H.
    q_BTNH = save_for_backward("query", apply_rope(q_BTNH, inputs.sin_cos, config.head_dim**-0.5))
    k_BTKH = matmul(config, "BTD,DKH->BTKH", x_BTD, layer.wk)
    k_BTKH = save_for_backward("key", apply_rope(k_BTKH, inputs.sin_cos))
    v_BTKH = save_for_backward("value", matmul(config, "BTD,DKH->BTKH", x_BTD, layer.wv))
    if cache is None:
        out_BTNH = attention(
            q_BTNH, k_BTKH, v_BTKH, inputs.segments_BT, config.attention, inputs.ends_BT
        )
    else:
        assert inputs.used_B is not None
        out_BTNH, cache = update_and_attend(
            q_BTNH, k_BTKH, v_BTKH, cache,
            inputs.used_B, inputs.positions_BT, config.attention, inputs.pages_BP,
            copies_of_head(config.n_kv_heads),
        )  # fmt: skip
    return matmul(config, "BTNH,NHD->BTD", out_BTNH, layer.wo), cache


@jax.named_scope("feed_forward")
def _feed_forward(config: ModelConfig, layer: Block, x_BTD: jax.Array) -> jax.Array:
    gate_BTF = save_for_backward("gate", matmul(config, "BTD,DF->BTF", x_BTD, layer.w1))
    up_BTF = save_for_backward("up", matmul(config, "BTD,DF->BTF", x_BTD, layer.w3))
    return matmul(config, "BTF,FD->BTD", swiglu(gate_BTF, up_BTF), layer.w2)


@jax.named_scope("output")
def output_head(config: ModelConfig, model: Llama | UnstackedLlama, x_BTD: jax.Array) -> jax.Array:
    """Returns the logits [B, T, V] float32, given `hidden_states`."""
    if model.output is None:
        logits_BTV = matmul(config, "BTD,VD->BTV", x_BTD, model.tok_embeddings)
    else:
        logits_BTV = matmul(config, "BTD,DV->BTV", x_BTD, model.output)
    return logits_BTV.astype(jnp.float32)


def _norm(config: ModelConfig, name: str, x_BTD: jax.Array, scale_D: nnx.Param) -> jax.Array:
    with jax.named_scope(name):
        return rms_norm(x_BTD, jax.reshard(scale_D[...], activation_spec("D")), config.norm_eps)


def _sin_cos(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    return rope_sin_cos(config, jax.reshard(positions_BT, activation_spec("BT")))
