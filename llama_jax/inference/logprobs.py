"""Log-probabilities of given tokens, without materializing a [T, V] array."""

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

# Logits are materialized for this many positions at a time: those of all positions can be larger
# than the model.
POSITIONS_PER_CHUNK = 128


@partial(jax.jit, static_argnums=0)
def token_logprobs(
    config: ModelConfig, model: Llama | UnstackedLlama, tokens_BT: jax.Array, targets_BT: jax.Array
) -> jax.Array:
    """Returns the log-probabilities, float32 [B, T], of `targets_BT` after `tokens_BT` [nats].

    Target t follows the tokens 0 … t. Logits are materialized for a few positions at a time.
    Padding on the right doesn't change the results to its left. Where a target is -1, which is
    outside the vocabulary, the result has no meaning.
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
    """Returns the results of `logprobs_from_logits` for the hidden states `x_BTD`.

    These are float32 [B, T] and [B, T, top], and int32 [B, T, top]. Logits are materialized for a
    few positions at a time.
    """
    x_BSD, targets_BS = jax.reshard(
        (x_BTD, targets_BT), (activation_spec("BSD"), activation_spec("BS"))
    )
    B, S, _ = x_BSD.shape
    size = max(n for n in divisors(S) if n <= POSITIONS_PER_CHUNK)

    def chunk_logprobs(_, i: jax.Array):
        x, targets = (
            jax.lax.dynamic_slice_in_dim(a, i * size, size, 1) for a in (x_BSD, targets_BS)
        )
        logits_BSV = jax.reshard(output_head(config, model, x), activation_spec("BSV"))
        return None, logprobs_from_logits(logits_BSV, targets, top)

    def join_chunks(chunks: jax.Array) -> jax.Array:
        more = chunks.shape[3:]
        dims = "BSS"[: 2 + len(more)]
        return chunks.swapaxes(0, 1).reshape(B, S, *more, out_sharding=activation_spec(dims))

    _, chunks = jax.lax.scan(chunk_logprobs, None, jnp.arange(S // size))
    logprobs_BS, top_logprobs_BSA, top_tokens_BSA = map(join_chunks, chunks)
    return logprobs_BS, top_logprobs_BSA, top_tokens_BSA


def prompt_logprobs(
    config: ModelConfig, model: Llama | UnstackedLlama, tokens_BT: np.ndarray
) -> np.ndarray:
    """Returns the log-probability of each token but the first, float32 [B, T - 1] [nats].

    Padding on the right doesn't change the results to its left.
    """
    targets_BT = np.roll(tokens_BT, -1, axis=1)
    logprobs_BT = token_logprobs(
        config, model, shard_array(tokens_BT, "BS"), shard_array(targets_BT, "BS")
    )
    return np.asarray(logprobs_BT)[:, :-1]
