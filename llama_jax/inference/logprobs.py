"""Log-probabilities of given tokens, without materializing a [T, V] array."""

import jax
import jax.numpy as jnp

from llama_jax.config.model import ModelConfig
from llama_jax.inference.sampling import logprobs_from_logits
from llama_jax.model.transformer import output_head
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import divisors
from llama_jax.parallel.sharding import activation_spec

# Logits are materialized for this many positions at a time: those of all positions can be larger
# than the model.
POSITIONS_PER_CHUNK = 128


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
