"""Checks and converts the arguments of `transformer.forward`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError


def as_token_array(config: ModelConfig, tokens_BT: Any) -> Any:
    """Returns token ids, given as lists or an array, as an array [B, T].

    Raises:
        InputError: they are not an integer array with two axes, or an id is not in the vocabulary.
            The ids are checked only if their values are known: not under `jax.jit`.
    """
    try:
        tokens_BT = as_array(tokens_BT)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the tokens are not an array [B, T]: give rows of equal length ({str(error)[:100]})"
        ) from error
    if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise InputError(
            f"the tokens must be integers [B, T], not {tokens_BT.dtype}"
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


def as_array(x: Any) -> Any:
    """Returns lists of numbers as an array: a JAX array if one of them is traced, else NumPy."""
    if isinstance(x, jax.Array | np.ndarray):
        return x
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(x))
    return jnp.asarray(x) if traced else np.asarray(x)
