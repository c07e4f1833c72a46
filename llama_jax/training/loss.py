"""Cross-entropy of the next token."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.data.batches import Batch
from llama_jax.family import ModelConfig
from llama_jax.model.transformer import Llama, hidden_states
from llama_jax.sharding import act

# Positions whose logits exist at a time. [B, T, V] in float32 is the largest array of a training
# step, many times over; a chunk of it costs nothing but reading the head's gradient once more.
CHUNK = 128


def loss_sums(config: ModelConfig, model: Llama, batch: Batch, z_loss: float):
    """Returns the summed objective of a batch and (summed cross-entropy [nats], counted targets).

    Targets below 0 do not count. The objective adds z_loss · log² Z per target, which keeps the
    normaliser Z near 1 (PaLM, arXiv 2204.02311, section 5). Sums, not means: what the caller
    divides by is the number of targets of the whole batch, over all micro-batches and devices.
    Only the objective can be differentiated.
    """
    x_BTD, _ = hidden_states(config, model, batch.tokens, batch.positions, batch.segments)
    w_DV = model.tok_embeddings[...].T if model.output is None else model.output[...]
    sums: Any = _head_loss(z_loss, x_BTD, w_DV, batch.targets)
    objective, nll = sums
    return objective, (jax.lax.stop_gradient(nll), jnp.sum(batch.targets >= 0))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss(z_loss: float, x_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array):
    """Returns objective and cross-entropy, summed over the chunks of T."""
    w_DV = jax.reshard(w_DV.astype(x_BTD.dtype), act("DV"))

    def add(sums, chunk):
        x_BTD, targets_BT = chunk
        objective, nll, _ = _chunk_loss(z_loss, x_BTD, targets_BT, w_DV)
        return (sums[0] + objective, sums[1] + nll), None

    zero = jnp.float32(0)
    return jax.lax.scan(add, (zero, zero), _chunks(x_BTD, targets_BT))[0]


def _chunks(x_BTD, targets_BT):
    """Returns both with T cut into a leading axis of chunks; what is padded does not count."""
    B, T, D = x_BTD.shape
    size = min(CHUNK, T)
    padding = (0, -T % size)
    x_BTD = jnp.pad(x_BTD, ((0, 0), padding, (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), padding), constant_values=-1)
    x = x_BTD.reshape(B, -1, size, D, out_sharding=act("BATD"))
    targets = targets_BT.reshape(B, -1, size, out_sharding=act("BAT"))
    return x.swapaxes(0, 1), targets.swapaxes(0, 1)


def _chunk_loss(z_loss, x_BTD, targets_BT, w_DV):
    """Returns the objective and the cross-entropy of one chunk, and d objective / d logits."""
    logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, w_DV, out_sharding=act("BTV"))
    logits_BTV = logits_BTV.astype(jnp.float32)
    counted_BT = targets_BT >= 0
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # A gather along the vocabulary is refused where that is split over devices.
    chosen_BTV = jnp.arange(w_DV.shape[1]) == targets_BT[..., None]
    chosen_BT = jnp.sum(jnp.where(chosen_BTV, logits_BTV, 0), axis=-1)
    nll = jnp.sum(jnp.where(counted_BT, log_z_BT - chosen_BT, 0))
    objective = nll + z_loss * jnp.sum(jnp.where(counted_BT, log_z_BT**2, 0))
    scale_BT = jnp.where(counted_BT, 1 + 2 * z_loss * log_z_BT, 0)
    d_logits_BTV = jnp.exp(logits_BTV - log_z_BT[..., None]) * scale_BT[..., None] - chosen_BTV
    return objective, nll, d_logits_BTV.astype(x_BTD.dtype)


def _head_loss_forward(z_loss, x_BTD, w_DV, targets_BT):
    """Makes the gradients along with the loss, chunk by chunk, so that no logits are kept."""
    B, T, D = x_BTD.shape
    w = jax.reshard(w_DV.astype(x_BTD.dtype), act("DV"))

    def add(sums, chunk):
        x_BTD, targets_BT = chunk
        objective, nll, d_logits = _chunk_loss(z_loss, x_BTD, targets_BT, w)
        dx = jnp.einsum("BTV,DV->BTD", d_logits, w, out_sharding=act("BTD"))
        dw = jnp.einsum("BTD,BTV->DV", x_BTD, d_logits, out_sharding=jax.typeof(w_DV).sharding)
        return (sums[0] + objective, sums[1] + nll, sums[2] + dw), dx

    zero = jnp.float32(0)
    start = zero, zero, jnp.zeros_like(w_DV, jnp.float32)
    (objective, nll, dw), dx = jax.lax.scan(add, start, _chunks(x_BTD, targets_BT))
    dx = dx.swapaxes(0, 1).reshape(B, -1, D, out_sharding=act("BTD"))[:, :T]
    return (objective, nll), (dx, dw.astype(w_DV.dtype))


def _head_loss_backward(z_loss, gradients, d_sums):
    dx, dw = gradients
    d_objective, _ = d_sums
    return (d_objective * dx).astype(dx.dtype), (d_objective * dw).astype(dw.dtype), None


_head_loss.defvjp(_head_loss_forward, _head_loss_backward)
