"""Log-probabilities of given tokens, without a [T, V] array."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.inference.sampling import logprobs_from_logits
from llama_jax.model.transformer import hidden_states, output_head
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.collectives import shard_sequence, to_text_order
from llama_jax.parallel.mesh import divisors, shard_array
from llama_jax.parallel.sharding import activation_spec

# Positions whose logits are there at a time: of all, they would be larger than many a model.
POSITIONS_PER_CHUNK = 128


@partial(jax.jit, static_argnums=0)
def token_logprobs(
    config: ModelConfig, model: Llama | UnstackedLlama, tokens_BT: jax.Array, targets_BT: jax.Array
) -> jax.Array:
    """Returns the log-probability [B, T] float32 of each target, given its token and those before.

    The logits of a few positions are there at a time. Padding on the right changes nothing before
    it; a target of -1 is none of the vocabulary, and has no meaning here.
    """
    x_BTD = hidden_states(config, model, shard_sequence(tokens_BT))
    logprobs_BT, _, _ = logprobs_from_hidden(config, model, x_BTD, shard_sequence(targets_BT))
    return to_text_order(logprobs_BT)


def logprobs_from_hidden(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    top: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what `logprobs_from_logits` returns, computed from `hidden_states`.

    float32 [B, T] and [B, T, top], int32 [B, T, top]. The logits of a few positions are there at a
    time.
    """
    x_BSD, targets_BS = jax.reshard(
        (x_BTD, targets_BT), (activation_spec("BSD"), activation_spec("BS"))
    )
    B, S, _ = x_BSD.shape
    size = max(n for n in divisors(S) if n <= POSITIONS_PER_CHUNK)

    def of_part(_, i: jax.Array):
        x, targets = (
            jax.lax.dynamic_slice_in_dim(a, i * size, size, 1) for a in (x_BSD, targets_BS)
        )
        logits_BSV = jax.reshard(output_head(config, model, x), activation_spec("BSV"))
        return None, logprobs_from_logits(logits_BSV, targets, top)

    def joined(part: jax.Array) -> jax.Array:
        more = part.shape[3:]
        dims = "BSS"[: 2 + len(more)]
        return part.swapaxes(0, 1).reshape(B, S, *more, out_sharding=activation_spec(dims))

    _, parts = jax.lax.scan(of_part, None, jnp.arange(S // size))
    logprobs_BS, top_logprobs_BSA, top_tokens_BSA = map(joined, parts)
    return logprobs_BS, top_logprobs_BSA, top_tokens_BSA


def prompt_logprobs(
    config: ModelConfig, model: Llama | UnstackedLlama, tokens_BT: np.ndarray
) -> np.ndarray:
    """Returns the log-probability [B, T - 1] float32 of each token but the first, given its past.

    Padding on the right changes nothing before it.
    """
    targets_BT = np.roll(tokens_BT, -1, axis=1)
    told = token_logprobs(
        config, model, shard_array(tokens_BT, "BS"), shard_array(targets_BT, "BS")
    )
    return np.asarray(told)[:, :-1]
