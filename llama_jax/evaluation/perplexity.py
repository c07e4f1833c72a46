"""How well a model foretells a text."""

from collections.abc import Sequence

import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.inference.logprobs import POSITIONS_PER_CHUNK, token_logprobs
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import shard_array

_ROWS = 4  # windows computed together


def nats_per_token(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    tokens: Sequence[int],
    *,
    window: int = 2048,
) -> float:
    """Returns the mean cross-entropy of all tokens but the first [nats]; its exp is perplexity.

    The text is cut into windows, and a token is foretold from those before it in its window.

    Args:
        config: of the model, which may be quantized.
        model: on the current mesh.
        tokens: ids of one text, at least two.
        window: tokens that are foretold in a window; no more than the model's context.

    Raises:
        InputError: there are fewer than two tokens, or one is none of the model's.
    """
    if len(tokens) < 2:
        raise InputError("the text is shorter than two tokens: give a longer one")
    if not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
        raise InputError(
            f"token {max(tokens)} of the text is outside the model's vocabulary of"
            f" {config.vocab_size}: the tokenizer is not this model's"
        )
    foretold = len(tokens) - 1
    window = min(window, config.context, -(-foretold // POSITIONS_PER_CHUNK) * POSITIONS_PER_CHUNK)
    windows = -(-foretold // window)
    rows = min(_ROWS, windows)
    text = np.full(-(-windows // rows) * rows * window + 1, -1, np.int32)
    text[: len(tokens)] = tokens
    inputs, targets = (part.reshape(-1, rows, window) for part in (text[:-1], text[1:]))
    told = [
        token_logprobs(config, model, shard_array(np.maximum(a, 0), "BS"), shard_array(b, "BS"))
        for a, b in zip(inputs, targets, strict=True)
    ]
    sums = [
        np.sum(np.asarray(a)[b >= 0], dtype=np.float64) for a, b in zip(told, targets, strict=True)
    ]
    return -float(sum(sums)) / foretold
