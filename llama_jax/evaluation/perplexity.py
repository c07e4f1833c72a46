"""The perplexity of a model on a text."""

from collections.abc import Sequence

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.inference.score import ScoreRequest, score
from llama_jax.model.weights import Llama, UnstackedLlama


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
    window, n_predicted = min(window, config.context), len(tokens) - 1
    windows = (tuple(tokens[i : i + window + 1]) for i in range(0, n_predicted, window))
    scores = score(config, model, [ScoreRequest(ids, n_context=1) for ids in windows])
    return -sum(window_score.total for _, window_score in scores) / n_predicted
