"""The perplexity of a model on a text."""

import math
from collections.abc import Sequence

import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.inference.logprobs import POSITIONS_PER_CHUNK, token_logprobs
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import shard_array

_ROWS = 4  # windows per batch


def nats_per_token(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    tokens: Sequence[int],
    *,
    window: int = 2048,
) -> float:
    """Returns the mean cross-entropy of all tokens but the first [nats]; its exp is perplexity.

    The text is cut into windows; the model predicts each token from the earlier tokens of its
    window.

    Args:
        config: the model's config; the model may be quantized.
        model: weights of that config, on the current mesh.
        tokens: ids of one text, at least two.
        window: tokens to predict in one window; at most the model's context is used.

    Raises:
        InputError: there are fewer than two tokens, or a token is outside the vocabulary.
    """
    if len(tokens) < 2:
        raise InputError("the text is shorter than two tokens: give a longer one")
    unknown = [i for i in tokens if not 0 <= i < config.vocab_size]
    if unknown:
        raise InputError(
            f"token {unknown[0]} of the text is outside the model's vocabulary of"
            f" {config.vocab_size}: the tokenizer is not this model's"
        )
    n_predicted = len(tokens) - 1
    needed = math.ceil(n_predicted / POSITIONS_PER_CHUNK) * POSITIONS_PER_CHUNK
    window = min(window, config.context, needed)
    n_windows = math.ceil(n_predicted / window)
    rows = min(_ROWS, n_windows)
    padded = np.full(math.ceil(n_windows / rows) * rows * window + 1, -1, np.int32)
    padded[: len(tokens)] = tokens
    inputs, targets = (part.reshape(-1, rows, window) for part in (padded[:-1], padded[1:]))
    logprobs = [
        token_logprobs(config, model, shard_array(np.maximum(a, 0), "BS"), shard_array(b, "BS"))
        for a, b in zip(inputs, targets, strict=True)
    ]
    sums = [
        np.sum(np.asarray(a)[b >= 0], dtype=np.float64)
        for a, b in zip(logprobs, targets, strict=True)
    ]
    return -float(sum(sums)) / n_predicted
