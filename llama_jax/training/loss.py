"""Cross-entropy of the next token."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax.config.model import ModelConfig
from llama_jax.data.windows import Batch
from llama_jax.model.linear_cpu import accumulate_dtype, einsum_float32
from llama_jax.model.lora import is_adapted
from llama_jax.model.quantize import Int8Matrix
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
    devices. Only the objective is differentiable; the head has a gradient unless it is frozen.
    """
    batch = jax.tree.map(shard_sequence, batch)
    x_BTD = hidden_states(config, model, batch.tokens, batch.positions, batch.segments)
    w_DV, scale_V = head_weight(model)
    static = _Static(z_loss, config.reduce_dtype, not config.scan, is_adapted(model))
    with jax.named_scope("loss"):
        sums: Any = _head_loss(static, x_BTD, w_DV, scale_V, batch.targets)
    objective, nll = sums
    return objective, (jax.lax.stop_gradient(nll), jnp.sum(batch.targets >= 0))


def head_weight(model: Llama) -> tuple[jax.Array, jax.Array | None]:
    """Returns the matrix [D, V] of the head, and for int8 values the scales [V]."""
    head: Any = model.tok_embeddings if model.output is None else model.output
    w, scale_V = (head.values, head.scale[...]) if isinstance(head, Int8Matrix) else (head, None)
    return w[...].T if model.output is None else w[...], scale_V


class _Static(NamedTuple):
    z_loss: float
    reduce_dtype: str
    unroll: bool  # of the loop over chunks
    frozen: bool  # the head has no gradient


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss(
    static: _Static,
    x_BTD: jax.Array,
    w_DV: jax.Array,
    scale_V: jax.Array | None,
    targets_BT: jax.Array,
):
    """Returns the objective and the cross-entropy, each summed over all tokens."""

    def local(x_BTD, w_DV, scale_V, targets_BT):
        w_DV = w_DV.astype(x_BTD.dtype)

        def add(sums, chunk):
            x_BTD, targets_BT = chunk
            objective, nll, _ = _chunk_loss(static.z_loss, x_BTD, targets_BT, w_DV, scale_V)
            return (sums[0] + objective, sums[1] + nll), None

        zero = jnp.float32(0)
        chunks = _chunks(x_BTD, targets_BT, w_DV.shape[1])
        sums, _ = jax.lax.scan(add, (zero, zero), chunks, unroll=static.unroll)
        return jax.tree.map(sum_over_tokens, sums)

    specs = tuple(map(activation_spec, ("BTD", "DV", "V", "BT")))
    mapped = jax.shard_map(local, in_specs=specs, out_specs=(P(), P()), check_vma=False)
    return mapped(x_BTD, *_gather_head(w_DV, scale_V, x_BTD.dtype), targets_BT)


def _gather_head(w_DV: jax.Array, scale_V: jax.Array | None, dtype: Any):
    """Returns the matrix gathered in `dtype`; int8 values are gathered as int8, with the scales."""
    if scale_V is None:
        return gather_weight(w_DV, "DV", dtype), None
    return gather_weight(w_DV, "DV", w_DV.dtype), jax.reshard(scale_V, activation_spec("V"))


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


def _chunk_loss(z_loss, x_BTD, targets_BT, w_DV, scale_V):
    """Returns the objective and the cross-entropy of one chunk, and d objective / d xw.

    V is this device's shard of the vocabulary.
    """
    V = w_DV.shape[1]
    logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, w_DV, preferred_element_type=jnp.float32)
    if scale_V is not None:
        logits_BTV = logits_BTV * scale_V
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
    if scale_V is not None:
        d_logits_BTV = d_logits_BTV * scale_V
    return objective, nll, d_logits_BTV.astype(x_BTD.dtype)


def _head_loss_forward(static: _Static, x_BTD, w_DV, scale_V, targets_BT):
    """Computes the gradients together with the loss, chunk by chunk, so that no logits are saved.

    The head's gradient is summed over the chunks on each device, and then once over the devices.
    """

    def local(x_BTD, w_DV, scale_V, targets_BT):
        B, T, D = x_BTD.shape
        w_DV = w_DV.astype(x_BTD.dtype)

        def add(sums, chunk):
            # Otherwise an unrolled loop would materialize the logits of several chunks at once.
            (x_BTD, targets_BT), sums = jax.lax.optimization_barrier((chunk, sums))
            loss = _chunk_loss(static.z_loss, x_BTD, targets_BT, w_DV, scale_V)
            objective, nll, d_logits = loss
            out = accumulate_dtype(x_BTD.dtype)
            dx = jnp.einsum("BTV,DV->BTD", d_logits, w_DV, preferred_element_type=out)
            dw = None if static.frozen else einsum_float32("BTD,BTV->DV", x_BTD, d_logits)
            sums = jax.tree.map(jnp.add, sums, (objective, nll, dw))
            return sums, dx.astype(x_BTD.dtype)

        zero = jnp.float32(0)
        start = zero, zero, None if static.frozen else jnp.zeros(w_DV.shape, jnp.float32)
        chunks = _chunks(x_BTD, targets_BT, w_DV.shape[1])
        (objective, nll, dw), dx = jax.lax.scan(add, start, chunks, unroll=static.unroll)
        dx = reduce_over_vocab(jax.lax.psum, dx).swapaxes(0, 1).reshape(B, -1, D)[:, :T]
        sums = sum_over_tokens(objective), sum_over_tokens(nll)
        dw = None if static.frozen else sum_gradient(dw, "DV", static.reduce_dtype)
        return sums, dx, dw

    specs = tuple(map(activation_spec, ("BTD", "DV", "V", "BT")))
    out_specs = (P(), P()), activation_spec("BTD"), weight_spec("DV")
    mapped = jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=False)
    head = _gather_head(w_DV, scale_V, x_BTD.dtype)
    sums, dx, dw = mapped(x_BTD, *head, targets_BT)
    return sums, (dx, None if dw is None else dw.astype(w_DV.dtype))


def _head_loss_backward(static: _Static, gradients, d_sums):
    dx, dw = gradients
    d_objective, _ = d_sums
    dx = (d_objective * dx).astype(dx.dtype)
    return dx, None if dw is None else (d_objective * dw).astype(dw.dtype), None, None


_head_loss.defvjp(_head_loss_forward, _head_loss_backward)
