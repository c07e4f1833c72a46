"""Cross-entropy of the next token."""

import jax
import jax.numpy as jnp

from llama_jax.data.batches import Batch
from llama_jax.family import ModelConfig
from llama_jax.model.transformer import Llama, hidden_states, output_head


def loss_sums(config: ModelConfig, model: Llama, batch: Batch, z_loss: float):
    """Returns the summed objective of a batch and (summed cross-entropy [nats], counted targets).

    Targets below 0 do not count. The objective adds z_loss · log² Z per target, which keeps the
    normaliser Z near 1 (PaLM, arXiv 2204.02311, section 5). Sums, not means: what the caller
    divides by is the number of targets of the whole batch, over all micro-batches and devices.
    """
    x_BTD, _ = hidden_states(config, model, batch.tokens, batch.positions, batch.segments)
    logits_BTV = output_head(model, x_BTD)
    counted_BT = batch.targets >= 0
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # A gather along the vocabulary is refused where that is split over devices; a masked sum is not.
    chosen = jnp.arange(config.vocab_size) == batch.targets[..., None]
    nll_BT = jnp.where(counted_BT, log_z_BT - jnp.sum(jnp.where(chosen, logits_BTV, 0), axis=-1), 0)
    nll = jnp.sum(nll_BT)
    objective = nll + z_loss * jnp.sum(jnp.where(counted_BT, log_z_BT**2, 0))
    return objective, (nll, jnp.sum(counted_BT))
