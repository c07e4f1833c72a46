"""Limits on the next token of a row: biases of tokens, and a mask of the allowed tokens."""

import base64
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.parallel.mesh import shard_array
from llama_jax.parallel.sharding import activation_spec

MAX_BIAS = 100.0  # as in OpenAI's API: ±100 forces or forbids a token in practice
ALL_ALLOWED = np.uint32(2**32 - 1)  # a word of a mask that allows its 32 tokens


class LogitBias(NamedTuple):
    """Numbers that are added to the logits of each row, sharded as "BS"."""

    is_biased_B: jax.Array  # bool: whether the row has a bias
    bias_BV: jax.Array  # float32


def init_bias(n_vocab: int, biases: Sequence[Sequence[tuple[int, float]]]) -> LogitBias:
    """Returns the biases of rows; each row has pairs of a token and its bias."""
    is_biased_B = shard_array(np.array([bool(pairs) for pairs in biases]), "B")
    shape = len(biases), n_vocab
    if not any(biases):  # zeros need no transfer
        return LogitBias(
            is_biased_B, jnp.zeros(shape, jnp.float32, out_sharding=activation_spec("BS"))
        )
    bias_BV = np.zeros(shape, np.float32)
    for bias_V, pairs in zip(bias_BV, biases, strict=True):
        for token, bias in pairs:
            bias_V[token] = bias
    return LogitBias(is_biased_B, shard_array(bias_BV, "BS"))


def mask_words(n_vocab: int) -> int:
    """Returns the 32-bit words W of a mask: bit i of word w allows token 32 · w + i."""
    return -(-n_vocab // 32)


def full_mask(rows: int, n_vocab: int) -> jax.Array:
    """Returns the mask [B, W] that allows every token."""
    return shard_array(np.full((rows, mask_words(n_vocab)), ALL_ALLOWED), "BS")


def mask_to_text(mask_W: np.ndarray) -> str:
    """Returns a mask of one row as text, for messages to other hosts."""
    return base64.b64encode(zlib.compress(mask_W.tobytes(), 1)).decode()


def masks_from_text(texts: Sequence[str], n_vocab: int) -> np.ndarray:
    """Returns the masks [B, W] of rows; '' allows all tokens, and missing words allow none."""
    mask_BW = np.full((len(texts), mask_words(n_vocab)), ALL_ALLOWED)
    for row_mask_W, text in zip(mask_BW, texts, strict=True):
        if text:
            allowed_W = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint32)
            allowed_W = allowed_W[: len(row_mask_W)]
            row_mask_W[:] = 0
            row_mask_W[: len(allowed_W)] = allowed_W
    return mask_BW


def limit_logits(
    bias: LogitBias | None, mask_BW: jax.Array | None, logits_BV: jax.Array
) -> jax.Array:
    """Returns logits plus the bias, float32, and -inf for each token that is not allowed.

    The logits of a row without bias and mask are unchanged, bit by bit. A batch of such rows costs
    nothing.

    Args:
        bias: of each row; None if no row has one.
        mask_BW: uint32, the allowed tokens of each row; None if all are allowed.
        logits_BV: logits of the next token, any float dtype, any sharding.
    """
    if bias is None and mask_BW is None:
        return logits_BV
    logits_BV = jax.reshard(logits_BV, activation_spec("BS")).astype(jnp.float32)
    unbiased_BV = logits_BV
    if bias is not None:
        logits_BV = jax.lax.cond(
            jnp.any(bias.is_biased_B),
            lambda: jnp.where(bias.is_biased_B[:, None], unbiased_BV + bias.bias_BV, unbiased_BV),
            lambda: unbiased_BV,
        )
    if mask_BW is None:
        return logits_BV
    biased_BV = logits_BV
    return jax.lax.cond(
        jnp.any(is_restricted(mask_BW)),
        lambda: jnp.where(_unpack(mask_BW, biased_BV.shape[1]), biased_BV, -jnp.inf),
        lambda: biased_BV,
    )


def is_restricted(mask_BW: jax.Array) -> jax.Array:
    """Returns whether the mask of each row forbids a token, bool [B]."""
    return jnp.any(mask_BW != ALL_ALLOWED, axis=1)


def only_token(mask_BW: jax.Array, token_B: jax.Array) -> jax.Array:
    """Returns a mask [B, W] that allows only `token_B` in the rows that `mask_BW` restricts."""
    bit_B = jnp.uint32(1) << (token_B % 32).astype(jnp.uint32)
    is_word_BW = jnp.arange(mask_BW.shape[1]) == (token_B // 32)[:, None]
    only_BW = jnp.where(is_word_BW, bit_B[:, None], jnp.uint32(0))
    return jnp.where(is_restricted(mask_BW)[:, None], only_BW, mask_BW)


def _unpack(mask_BW: jax.Array, n_vocab: int) -> jax.Array:
    """Returns the bits of a mask, bool [B, V]."""
    bits_BWS = (mask_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    shape = len(mask_BW), mask_BW.shape[1] * 32
    bits_BV = bits_BWS.reshape(shape, out_sharding=activation_spec("BS"))
    return bits_BV[:, :n_vocab] > 0
