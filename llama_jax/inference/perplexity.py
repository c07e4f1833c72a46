"""How well a model foretells a text."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.errors import InputError
from llama_jax.family import ModelConfig
from llama_jax.inference.sampling import logprobs
from llama_jax.model.transformer import Llama, Unrolled, hidden_states, output_head
from llama_jax.sharding import act, balance, divisors, in_text_order, place

# Positions whose logits are there at a time: of all, they would be larger than many a model.
_POSITIONS = 128
_ROWS = 4  # windows computed together


def nats_per_token(
    config: ModelConfig,
    model: Llama | Unrolled,
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
    window = min(window, config.context, -(-foretold // _POSITIONS) * _POSITIONS)
    windows = -(-foretold // window)
    rows = min(_ROWS, windows)
    text = np.full(-(-windows // rows) * rows * window + 1, -1, np.int32)
    text[: len(tokens)] = tokens
    inputs, targets = (part.reshape(-1, rows, window) for part in (text[:-1], text[1:]))
    told = [
        token_logprobs(config, model, place(np.maximum(a, 0), "BS"), place(b, "BS"))
        for a, b in zip(inputs, targets, strict=True)
    ]
    sums = [
        np.sum(np.asarray(a)[b >= 0], dtype=np.float64) for a, b in zip(told, targets, strict=True)
    ]
    return -float(sum(sums)) / foretold


@partial(jax.jit, static_argnums=0)
def token_logprobs(
    config: ModelConfig, model: Llama | Unrolled, tokens_BT: jax.Array, targets_BT: jax.Array
) -> jax.Array:
    """Returns the log-probability [B, T] float32 of each target, given its token and those before.

    The logits of a few positions are there at a time. Padding on the right changes nothing before
    it; a target of -1 is none of the vocabulary, and has no meaning here.
    """
    x_BTD = hidden_states(config, model, balance(tokens_BT))
    logprobs_BT, _, _ = target_logprobs(config, model, x_BTD, balance(targets_BT))
    return in_text_order(logprobs_BT)


def target_logprobs(
    config: ModelConfig,
    model: Llama | Unrolled,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    top: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the log-probabilities of the targets by `hidden_states`, as `sampling.logprobs`.

    float32 [B, T] and [B, T, top], int32 [B, T, top]. The logits of a few positions are there at a
    time.
    """
    x_BSD, targets_BS = jax.reshard((x_BTD, targets_BT), (act("BSD"), act("BS")))
    B, S, _ = x_BSD.shape
    size = max(n for n in divisors(S) if n <= _POSITIONS)

    def of_part(_, i: jax.Array):
        x, targets = (
            jax.lax.dynamic_slice_in_dim(a, i * size, size, 1) for a in (x_BSD, targets_BS)
        )
        logits_BSV = jax.reshard(output_head(config, model, x), act("BSV"))
        return None, logprobs(logits_BSV, targets, top)

    def joined(part: jax.Array) -> jax.Array:
        more = part.shape[3:]
        dims = "BSS"[: 2 + len(more)]
        return part.swapaxes(0, 1).reshape(B, S, *more, out_sharding=act(dims))

    _, parts = jax.lax.scan(of_part, None, jnp.arange(S // size))
    logprobs_BS, top_logprobs_BSA, top_tokens_BSA = map(joined, parts)
    return logprobs_BS, top_logprobs_BSA, top_tokens_BSA


def prompt_logprobs(
    config: ModelConfig, model: Llama | Unrolled, tokens_BT: np.ndarray
) -> np.ndarray:
    """Returns the log-probability [B, T - 1] float32 of each token but the first, given its past.

    Padding on the right changes nothing before it.
    """
    targets_BT = np.roll(tokens_BT, -1, axis=1)
    told = token_logprobs(config, model, place(tokens_BT, "BS"), place(targets_BT, "BS"))
    return np.asarray(told)[:, :-1]
