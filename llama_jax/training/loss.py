"""Cross-entropy of the next token: the sum, or that of each token."""

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
    sum_over_context,
    sum_over_tokens,
    vocab_shard_start,
)
from llama_jax.parallel.sharding import activation_spec, weight_spec

# Largest size of the float32 logits that a device materializes at a time. The complete [B, T, V]
# would be by far the largest array of a training step. Chunks of T cost only one more read of the
# head's gradient for each chunk.
CHUNK_BYTES = 1 << 30


class RowSums(NamedTuple):
    """Sums over the counted targets of each row of a batch, [B] or, with micro-batches, [A, B]."""

    nll: Any  # cross-entropy [nats], float32
    targets: Any  # their number, int32


def loss_sums(
    config: ModelConfig, model: Llama, batch: Batch, z_loss: float
) -> tuple[jax.Array, RowSums]:
    """Returns the summed objective of a batch, and the sums of each row.

    Targets below 0 do not count. The objective adds z_loss · log² Z per target, so that the
    normalizer Z stays near 1 (PaLM, arXiv 2204.02311, section 5). These are sums, not means: the
    caller divides by the number of targets of the complete batch, over all micro-batches and
    devices. Only the objective is differentiable; the head has a gradient unless it is frozen.
    """
    batch = jax.tree.map(shard_sequence, batch)
    operands = _operands(config, model, batch, z_loss)
    with jax.named_scope("loss"):
        sums: Any = _head_loss(*operands)
    objective, nll_B = sums
    return objective, RowSums(
        jax.lax.stop_gradient(nll_B), jnp.sum(batch.targets >= 0, axis=1, dtype=jnp.int32)
    )


def token_losses(config: ModelConfig, model: Llama, batch: Batch) -> jax.Array:
    """Returns the cross-entropy of each target, float32 [B, T] [nats]; 0 for targets below 0.

    `batch` and the result have T in balanced order (`collectives.shard_sequence`). An objective may
    depend on these in any way: the gradient computes the logits again, and weights the tokens.
    """
    operands = _operands(config, model, batch, z_loss=0.0)
    with jax.named_scope("loss"):
        nll_BT: Any = _token_losses(*operands)
    return nll_BT


class _Static(NamedTuple):
    z_loss: float
    reduce_dtype: str
    unroll: bool  # of the loop over chunks
    frozen: bool  # the head has no gradient


class _Head(NamedTuple):
    w_DV: Any
    scale_V: Any  # of int8 values; otherwise None


def _operands(config: ModelConfig, model: Llama, batch: Batch, z_loss: float):
    """Returns the settings, hidden states, head and targets of a batch in balanced order."""
    x_BTD = hidden_states(config, model, batch.tokens, batch.positions, batch.segments)
    static = _Static(z_loss, config.reduce_dtype, not config.scan, is_adapted(model))
    return static, x_BTD, _Head(*head_weight(model)), batch.targets


def head_weight(model: Llama) -> tuple[jax.Array, jax.Array | None]:
    """Returns the matrix [D, V] of the head, and for int8 values the scales [V]."""
    head: Any = model.tok_embeddings if model.output is None else model.output
    w, scale_V = (head.values, head.scale[...]) if isinstance(head, Int8Matrix) else (head, None)
    return w[...].T if model.output is None else w[...], scale_V


def _gather_head(head: _Head, dtype: Any) -> _Head:
    """Returns the matrix gathered in `dtype`; int8 values are gathered as int8, with the scales."""
    w_DV, scale_V = head
    if scale_V is None:
        return _Head(gather_weight(w_DV, "DV", dtype), None)
    return _Head(gather_weight(w_DV, "DV", w_DV.dtype), jax.reshard(scale_V, activation_spec("V")))


_HEAD_SPECS = _Head(activation_spec("DV"), activation_spec("V"))
_SUM_SPECS = P(), activation_spec("B")


def _losses(static: _Static, x_BTD: jax.Array, head: _Head, targets_BT: jax.Array):
    """Returns (the summed objective, the cross-entropy of each row), and that of each token."""

    def local(x_BTD, head, targets_BT):
        head = head._replace(w_DV=head.w_DV.astype(x_BTD.dtype))

        def add(sums, chunk):
            more, nll_BT, _ = _chunk_loss(static.z_loss, head, *chunk)
            return jax.tree.map(jnp.add, sums, more), nll_BT

        chunks = _split_chunks(head.w_DV.shape[1], x_BTD, targets_BT)
        start = jnp.float32(0), jnp.zeros(len(x_BTD), jnp.float32)
        (objective, nll_B), nll = jax.lax.scan(add, start, chunks, unroll=static.unroll)
        sums = sum_over_tokens(objective), sum_over_context(nll_B)
        return sums, _join_chunks(nll, x_BTD.shape[1])

    specs = activation_spec("BTD"), _HEAD_SPECS, activation_spec("BT")
    out_specs = _SUM_SPECS, activation_spec("BT")
    mapped = jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=False)
    return mapped(x_BTD, _gather_head(head, x_BTD.dtype), targets_BT)


def _split_chunks(V: int, x_BTD: jax.Array, *tokens_BT: jax.Array):
    """Returns all with T split into a leading axis of chunks; padded targets do not count.

    Args:
        V: this device's shard of the vocabulary.
        x_BTD: hidden states.
        tokens_BT: targets, and optionally the weights of the tokens.
    """
    B, T, _ = x_BTD.shape
    fitting = max(1, CHUNK_BYTES // (4 * B * V))
    size = min(T, 1 << (fitting.bit_length() - 1))

    def split(a: jax.Array, padding: int) -> jax.Array:
        widths = (0, 0), (0, -T % size), *((0, 0) for _ in a.shape[2:])
        a = jnp.pad(a, widths, constant_values=padding)
        return a.reshape(B, -1, size, *a.shape[2:]).swapaxes(0, 1)

    return split(x_BTD, 0), *(split(a, -1) for a in tokens_BT)


def _join_chunks(chunks: jax.Array, T: int) -> jax.Array:
    """Returns [B, T, …], given the results of all chunks: [chunks, B, size, …]."""
    _, B, _, *more = chunks.shape
    return chunks.swapaxes(0, 1).reshape(B, -1, *more)[:, :T]


def _chunk_loss(z_loss, head, x_BTD, targets_BT, weights_BT=None):
    """Returns a chunk's sums, the cross-entropy of each token, and d objective / d xw.

    The sums are those of `_losses`. V is this device's shard of the vocabulary. In the derivative,
    and only there, each token has its weight (default: 1).
    """
    w_DV, scale_V = head
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
    nll_BT = jnp.where(counted_BT, log_z_BT - chosen_BT, 0)
    nll_B = jnp.sum(nll_BT, axis=1)
    objective = jnp.sum(nll_B) + z_loss * jnp.sum(jnp.where(counted_BT, log_z_BT**2, 0))
    scale_BT = jnp.where(counted_BT, 1 + 2 * z_loss * log_z_BT, 0)
    d_logits_BTV = jnp.exp(logits_BTV - log_z_BT[..., None]) * scale_BT[..., None] - chosen_BTV
    if weights_BT is not None:
        d_logits_BTV = d_logits_BTV * weights_BT[..., None]
    if scale_V is not None:
        d_logits_BTV = d_logits_BTV * scale_V
    return (objective, nll_B), nll_BT, d_logits_BTV.astype(x_BTD.dtype)


def _losses_and_gradients(static: _Static, x_BTD, head: _Head, targets_BT, *weights_BT):
    """Returns the sums of `_losses`, and the gradients of the objective for x_BTD and w_DV.

    Computes them chunk by chunk, so that no logits are saved. The head's gradient is summed over
    the chunks on each device, and then once over the devices.

    Args:
        weights_BT: if given, the weight of each token in the objective that has these gradients.
    """

    def local(x_BTD, head, *tokens_BT):
        head = head._replace(w_DV=head.w_DV.astype(x_BTD.dtype))

        def add(sums, chunk):
            # Otherwise an unrolled loop would materialize the logits of several chunks at once.
            chunk, sums = jax.lax.optimization_barrier((chunk, sums))
            (objective, nll_B), _, d_logits = _chunk_loss(static.z_loss, head, *chunk)
            x_BTD, out = chunk[0], accumulate_dtype(chunk[0].dtype)
            dx = jnp.einsum("BTV,DV->BTD", d_logits, head.w_DV, preferred_element_type=out)
            dw = None if static.frozen else einsum_float32("BTD,BTV->DV", x_BTD, d_logits)
            sums = jax.tree.map(jnp.add, sums, (objective, nll_B, dw))
            return sums, dx.astype(x_BTD.dtype)

        start_dw = None if static.frozen else jnp.zeros(head.w_DV.shape, jnp.float32)
        start = jnp.float32(0), jnp.zeros(len(x_BTD), jnp.float32), start_dw
        chunks = _split_chunks(head.w_DV.shape[1], x_BTD, *tokens_BT)
        (objective, nll_B, dw), dx = jax.lax.scan(add, start, chunks, unroll=static.unroll)
        dx = _join_chunks(reduce_over_vocab(jax.lax.psum, dx), x_BTD.shape[1])
        sums = sum_over_tokens(objective), sum_over_context(nll_B)
        dw = None if static.frozen else sum_gradient(dw, "DV", static.reduce_dtype)
        return sums, dx, dw

    tokens_BT = targets_BT, *weights_BT
    specs = activation_spec("BTD"), _HEAD_SPECS, *(activation_spec("BT") for _ in tokens_BT)
    out_specs = _SUM_SPECS, activation_spec("BTD"), weight_spec("DV")
    mapped = jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=False)
    sums, dx, dw = mapped(x_BTD, _gather_head(head, x_BTD.dtype), *tokens_BT)
    return sums, (dx, _Head(None if dw is None else dw.astype(head.w_DV.dtype), None))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss(static: _Static, x_BTD: jax.Array, head: _Head, targets_BT: jax.Array):
    """Returns the objective, summed over all tokens, and the cross-entropy of each row.

    Its tokens all have the same weight: the forward pass computes the gradients too, up to that
    factor.
    """
    return _losses(static, x_BTD, head, targets_BT)[0]


def _head_loss_backward(static: _Static, gradients, d_sums):
    d_objective, _ = d_sums
    return *jax.tree.map(lambda g: (d_objective * g).astype(g.dtype), gradients), None


_head_loss.defvjp(_losses_and_gradients, _head_loss_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(static: _Static, x_BTD: jax.Array, head: _Head, targets_BT: jax.Array):
    """Returns the cross-entropy of each token, [B, T]."""
    return _losses(static, x_BTD, head, targets_BT)[1]


def _token_losses_forward(static: _Static, *operands):
    return _token_losses(static, *operands), operands


def _token_losses_backward(static: _Static, operands, d_nll_BT):
    _, gradients = _losses_and_gradients(static, *operands, d_nll_BT)
    return *gradients, None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward)
