"""Cross-entropy of the next token."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax.config.model import ModelConfig
from llama_jax.data.windows import Batch
from llama_jax.model.linear_cpu import accumulate_dtype, einsum_float32
from llama_jax.model.transformer import hidden_states
from llama_jax.model.weights import Llama
from llama_jax.parallel.collectives import (
    gather_weight,
    reduce_over_vocab,
    shard_sequence,
    sum_gradient,
    sum_over_tokens,
    vocab_shard_start,
)
from llama_jax.parallel.sharding import activation_spec, weight_spec

# Largest size of the float32 logits that a device materializes at a time. The complete [B, T, V]
# would be by far the largest array of a training step. Chunks of T cost only one more read of the
# head's gradient for each chunk.
CHUNK_BYTES = 1 << 30


def loss_sums(config: ModelConfig, model: Llama, batch: Batch, z_loss: float):
    """Returns the summed objective of a batch and (summed cross-entropy [nats], counted targets).

    Targets below 0 do not count. The objective adds z_loss · log² Z per target, so that the
    normalizer Z stays near 1 (PaLM, arXiv 2204.02311, section 5). These are sums, not means: the
    caller divides by the number of targets of the complete batch, over all micro-batches and
    devices. Only the objective is differentiable.
    """
    batch = jax.tree.map(shard_sequence, batch)
    x_BTD = hidden_states(config, model, batch.tokens, batch.positions, batch.segments)
    w_DV = model.tok_embeddings[...].T if model.output is None else model.output[...]
    static = _Static(z_loss, config.reduce_dtype, not config.scan)
    with jax.named_scope("loss"):
        sums: Any = _head_loss(static, x_BTD, w_DV, batch.targets)
    objective, nll = sums
    return objective, (jax.lax.stop_gradient(nll), jnp.sum(batch.targets >= 0))


class _Static(NamedTuple):
    z_loss: float
    reduce_dtype: str
    unroll: bool  # of the loop over chunks


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss(static: _Static, x_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array):
    """Returns the objective and the cross-entropy, each summed over all tokens."""

    def local(x_BTD, w_DV, targets_BT):
        def add(sums, chunk):
            x_BTD, targets_BT = chunk
            objective, nll, _ = _chunk_loss(static.z_loss, x_BTD, targets_BT, w_DV)
            return (sums[0] + objective, sums[1] + nll), None

        zero = jnp.float32(0)
        chunks = _chunks(x_BTD, targets_BT, w_DV.shape[1])
        sums, _ = jax.lax.scan(add, (zero, zero), chunks, unroll=static.unroll)
        return jax.tree.map(sum_over_tokens, sums)

    specs = activation_spec("BTD"), activation_spec("DV"), activation_spec("BT")
    mapped = jax.shard_map(local, in_specs=specs, out_specs=(P(), P()), check_vma=False)
    return mapped(x_BTD, gather_weight(w_DV, "DV", x_BTD.dtype), targets_BT)


def _chunks(x_BTD, targets_BT, V: int):
    """Returns both with T split into a leading axis of chunks; padded targets do not count."""
    B, T, D = x_BTD.shape
    fitting = max(1, CHUNK_BYTES // (4 * B * V))
    size = min(T, 1 << (fitting.bit_length() - 1))
    padding = (0, -T % size)
    x_BTD = jnp.pad(x_BTD, ((0, 0), padding, (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), padding), constant_values=-1)
    x, targets = x_BTD.reshape(B, -1, size, D), targets_BT.reshape(B, -1, size)
    return x.swapaxes(0, 1), targets.swapaxes(0, 1)


def _chunk_loss(z_loss, x_BTD, targets_BT, w_DV):
    """Returns the objective and the cross-entropy of one chunk, and d objective / d logits.

    V is this device's shard of the vocabulary.
    """
    V = w_DV.shape[1]
    logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, w_DV, preferred_element_type=jnp.float32)
    counted_BT = targets_BT >= 0
    largest_BT1 = reduce_over_vocab(jax.lax.pmax, jnp.max(logits_BTV, axis=-1, keepdims=True))
    total_BT = reduce_over_vocab(jax.lax.psum, jnp.sum(jnp.exp(logits_BTV - largest_BT1), axis=-1))
    log_z_BT = largest_BT1[..., 0] + jnp.log(total_BT)
    chosen_BTV = vocab_shard_start(V) + jnp.arange(V) == targets_BT[..., None]
    chosen_BT = jnp.sum(jnp.where(chosen_BTV, logits_BTV, 0), axis=-1)
    chosen_BT = reduce_over_vocab(jax.lax.psum, chosen_BT)
    nll = jnp.sum(jnp.where(counted_BT, log_z_BT - chosen_BT, 0))
    objective = nll + z_loss * jnp.sum(jnp.where(counted_BT, log_z_BT**2, 0))
    scale_BT = jnp.where(counted_BT, 1 + 2 * z_loss * log_z_BT, 0)
    d_logits_BTV = jnp.exp(logits_BTV - log_z_BT[..., None]) * scale_BT[..., None] - chosen_BTV
    return objective, nll, d_logits_BTV.astype(x_BTD.dtype)


def _head_loss_forward(static: _Static, x_BTD, w_DV, targets_BT):
    """Computes the gradients together with the loss, chunk by chunk, so that no logits are saved.

    The head's gradient is summed over the chunks on each device, and then once over the devices.
    """

    def local(x_BTD, w_DV, targets_BT):
        B, T, D = x_BTD.shape

        def add(sums, chunk):
            # Otherwise an unrolled loop would materialize the logits of several chunks at once.
            (x_BTD, targets_BT), sums = jax.lax.optimization_barrier((chunk, sums))
            objective, nll, d_logits = _chunk_loss(static.z_loss, x_BTD, targets_BT, w_DV)
            out = accumulate_dtype(x_BTD.dtype)
            dx = jnp.einsum("BTV,DV->BTD", d_logits, w_DV, preferred_element_type=out)
            dw = einsum_float32("BTD,BTV->DV", x_BTD, d_logits)
            return (sums[0] + objective, sums[1] + nll, sums[2] + dw), dx.astype(x_BTD.dtype)

        zero = jnp.float32(0)
        start = zero, zero, jnp.zeros(w_DV.shape, jnp.float32)
        chunks = _chunks(x_BTD, targets_BT, w_DV.shape[1])
        (objective, nll, dw), dx = jax.lax.scan(add, start, chunks, unroll=static.unroll)
        dx = reduce_over_vocab(jax.lax.psum, dx).swapaxes(0, 1).reshape(B, -1, D)[:, :T]
        sums = sum_over_tokens(objective), sum_over_tokens(nll)
        return sums, dx, sum_gradient(dw, "DV", static.reduce_dtype)

    specs = activation_spec("BTD"), activation_spec("DV"), activation_spec("BT")
    out_specs = (P(), P()), activation_spec("BTD"), weight_spec("DV")
    mapped = jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=False)
    sums, dx, dw = mapped(x_BTD, gather_weight(w_DV, "DV", x_BTD.dtype), targets_BT)
    return sums, (dx, dw.astype(w_DV.dtype))


def _head_loss_backward(static: _Static, gradients, d_sums):
    dx, dw = gradients
    d_objective, _ = d_sums
    return (d_objective * dx).astype(dx.dtype), (d_objective * dw).astype(dw.dtype), None


_head_loss.defvjp(_head_loss_forward, _head_loss_backward)
