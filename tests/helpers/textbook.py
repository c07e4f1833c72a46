"""LLaMA as in the paper, with loops over layers and heads: the reference for tests.

This file shares no code with llama_jax. Weights are a dict of arrays with llama_jax's names and
axes. All arithmetic is in the dtype of the weights; float64 needs `jax.enable_x64(True)` around the
call.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NORM_EPS, ROPE_THETA = 1e-5, 10_000.0


def norm(x, scale):
    """RMSNorm (arXiv 1910.07467)."""
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + NORM_EPS) * scale


def apply_rope(x_BTH, positions_BT):
    """Rotary embedding (arXiv 2104.09864).

    Pair (i, i + H/2) of a head is rotated by position · theta^(-2i/H) radians.
    """
    half = x_BTH.shape[-1] // 2
    frequency = ROPE_THETA ** (-jnp.arange(half, dtype=x_BTH.dtype) / half)
    angle = positions_BT[..., None].astype(x_BTH.dtype) * frequency
    real, imaginary = x_BTH[..., :half], x_BTH[..., half:]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)


def softmax(scores):
    """Softmax over the last axis."""
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def logits(w: Mapping[str, Any], tokens_BT, positions_BT, segments_BT):
    """Returns the logits [B, T, V] and the largest attention score: rounding errors scale with it.

    A query attends to the keys up to its own position, in its own segment.
    """
    _, _, N, H = w["layers.wq"].shape
    K, T = w["layers.wk"].shape[2], tokens_BT.shape[1]
    causal_TS = np.arange(T)[:, None] >= np.arange(T)
    attended_BTS = causal_TS & (segments_BT[:, :, None] == segments_BT[:, None, :])
    x, largest_score = w["tok_embeddings"][tokens_BT], 0.0
    for layer in range(len(w["layers.wq"])):
        weight = {name.removeprefix("layers."): w_L[layer] for name, w_L in w.items()
                  if name.startswith("layers.")}  # fmt: skip
        h = norm(x, weight["attention_norm"])
        for head in range(N):
            kv_head = head // (N // K)
            q = apply_rope(h @ weight["wq"][:, head], positions_BT)
            k = apply_rope(h @ weight["wk"][:, kv_head], positions_BT)
            v = h @ weight["wv"][:, kv_head]
            scores = q @ k.swapaxes(1, 2) / H**0.5
            largest_score = jnp.maximum(largest_score, jnp.max(jnp.abs(scores)))
            x = x + softmax(jnp.where(attended_BTS, scores, -jnp.inf)) @ v @ weight["wo"][head]
        h = norm(x, weight["ffn_norm"])
        gate = h @ weight["w1"]
        x = x + (gate / (1 + jnp.exp(-gate)) * (h @ weight["w3"])) @ weight["w2"]
    head_DV = w["output"] if "output" in w else w["tok_embeddings"].T
    return norm(x, w["norm"]) @ head_DV, largest_score


def logprobs(w, tokens_BT, targets_BT, positions_BT, segments_BT):
    """Returns the log-probability [B, T] of each target, and log Z [B, T] [nats]."""
    scores, _ = logits(w, tokens_BT, positions_BT, segments_BT)
    largest = jnp.max(scores, axis=-1)
    log_z = largest + jnp.log(jnp.sum(jnp.exp(scores - largest[..., None]), axis=-1))
    chosen = jnp.take_along_axis(scores, jnp.maximum(targets_BT, 0)[..., None], axis=-1)[..., 0]
    return chosen - log_z, log_z


def loss_and_gradient(w, tokens_BT, targets_BT, positions_BT, segments_BT, z_loss):
    """Returns the mean cross-entropy, and the gradient of the objective for each weight.

    The mean is over the targets that are not negative. The objective adds z_loss · log² Z to the
    cross-entropy of each target (arXiv 2204.02311, section 5).
    """

    def objective(w):
        logprob, log_z = logprobs(w, tokens_BT, targets_BT, positions_BT, segments_BT)
        counted = targets_BT >= 0
        loss = -jnp.sum(jnp.where(counted, logprob, 0)) / jnp.sum(counted)
        penalty = jnp.sum(jnp.where(counted, log_z**2, 0)) / jnp.sum(counted)
        return loss + z_loss * penalty, loss

    (_, loss), gradient = jax.value_and_grad(objective, has_aux=True)(w)
    return loss, gradient


def dpo_and_gradient(w, reference, batch, beta, sft_weight):
    """Returns DPO's loss, the rewards of its pairs [pairs, 2], and the loss's gradient for `w`.

    The loss is equation 7 of arXiv 2305.18290. It adds sft_weight times the mean cross-entropy of
    the chosen answers' targets. In each row, segments 1, 3, … are chosen and 2, 4, … rejected.
    """
    tokens_BT, targets_BT, positions_BT, segments_BT = batch

    def answer(row, segment):
        return row, np.flatnonzero((segments_BT[row] == segment) & (targets_BT[row] >= 0))

    pairs = [
        (answer(row, segment), answer(row, segment + 1))
        for row in range(len(tokens_BT))
        for segment in range(1, segments_BT[row].max(), 2)
    ]

    def loss(w):
        policy_BT, _ = logprobs(w, tokens_BT, targets_BT, positions_BT, segments_BT)
        reference_BT, _ = logprobs(reference, tokens_BT, targets_BT, positions_BT, segments_BT)
        rewards = jnp.array([
            [beta * (jnp.sum(policy_BT[where]) - jnp.sum(reference_BT[where])) for where in pair]
            for pair in pairs
        ])  # fmt: skip
        margins = rewards[:, 0] - rewards[:, 1]
        chosen = jnp.concatenate([policy_BT[where] for where, _ in pairs])
        return jnp.mean(jnp.log(1 + jnp.exp(-margins))) - sft_weight * jnp.mean(chosen), rewards

    (value, rewards), gradient = jax.value_and_grad(loss, has_aux=True)(w)
    return value, rewards, gradient
