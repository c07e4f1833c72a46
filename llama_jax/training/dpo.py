"""Direct preference optimization: DPO (Rafailov et al., arXiv 2305.18290).

A preference is a pair of answers to one prompt. In a row of tokens, the segments 1, 3, … are the
chosen answers with their prompts, the segments 2, 4, … the rejected ones. A last segment without a
partner is padding. P: preferences of a row.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.config.run import Config
from llama_jax.data.windows import Batch
from llama_jax.model.weights import Llama
from llama_jax.parallel.collectives import shard_sequence
from llama_jax.parallel.sharding import activation_spec
from llama_jax.training.loss import token_losses


class PreferenceSums(NamedTuple):
    """Sums over the preferences of a batch.

    The reward of an answer is β · (its log-probability - that of the reference), over its targets.
    The margin of a preference is the reward of chosen - that of rejected.
    """

    loss: Any  # -log σ(margin) [nats]
    chosen_reward: Any
    rejected_reward: Any
    chosen_nll: Any  # cross-entropy of the targets of chosen [nats]
    correct: Any  # preferences with a positive margin
    preferences: Any
    chosen_targets: Any
    targets: Any


class PreferenceMetrics(NamedTuple):
    """Means over the preferences of a batch, and their number."""

    chosen_reward: Any
    rejected_reward: Any
    margin: Any
    accuracy: Any  # share of the preferences with a positive margin
    preferences: Any


def preference_sums(
    config: Config,
    model: Llama,
    reference: Llama,
    batch: Batch,
    scale: jax.Array | None = None,
) -> tuple[jax.Array, PreferenceSums]:
    """Returns the summed objective of a batch [B, T], and the sums for its metrics.

    The caller divides them by the preferences of the complete batch, over all micro-batches and
    devices. Only the objective is differentiable, and only for `model`.

    Args:
        config: of the run.
        model: weights that are trained.
        reference: frozen weights.
        batch: rows of preferences.
        scale: `sft_scale` of the complete batch, factor of chosen_nll in the objective; default: 0.
    """
    batch = jax.tree.map(shard_sequence, batch)
    nll_BT = token_losses(config.model, model, batch)
    reference_nll_BT = token_losses(config.model, jax.lax.stop_gradient(reference), batch)
    with jax.named_scope("dpo"):
        # Summed differences round less than the difference of an answer's two sums.
        reward_BT = config.training.dpo_beta * (reference_nll_BT - nll_BT)
        P = batch.tokens.shape[1] // 2  # at most: an answer has at least one token
        rewards = _sum_segments(reward_BT, batch.segments, 1 + 2 * P)
        chosen_BP, rejected_BP = rewards[:, 1::2], rewards[:, 2::2]
        margin_BP = chosen_BP - rejected_BP
        preferences_B = jnp.max(batch.segments, axis=1) // 2
        exists_BP = jnp.arange(1, P + 1) <= preferences_B[:, None]
        loss = jnp.sum(jnp.where(exists_BP, -jax.nn.log_sigmoid(margin_BP), 0))
        is_chosen_BT = _is_chosen(batch)
        chosen_nll = jnp.sum(jnp.where(is_chosen_BT, nll_BT, 0))
        sums = PreferenceSums(
            loss=loss,
            chosen_reward=jnp.sum(chosen_BP),
            rejected_reward=jnp.sum(rejected_BP),
            chosen_nll=chosen_nll,
            correct=jnp.sum(margin_BP > 0),
            preferences=jnp.sum(preferences_B),
            chosen_targets=jnp.sum(is_chosen_BT),
            targets=jnp.sum(batch.targets >= 0),
        )
        objective = loss if scale is None else loss + scale * chosen_nll
    return objective, jax.lax.stop_gradient(sums)


def _sum_segments(x_BT: jax.Array, segments_BT: jax.Array, size: int) -> jax.Array:
    """Returns the sums of x over the segments 0 … size - 1 of each row, [B, size]."""
    rows = activation_spec("BS")  # not split over T
    sum_row = partial(jax.ops.segment_sum, num_segments=size)
    mapped = jax.shard_map(jax.vmap(sum_row), in_specs=(rows, rows), out_specs=rows)
    return mapped(*jax.reshard((x_BT, segments_BT), (rows, rows)))


def _is_chosen(batch: Batch) -> jax.Array:
    return (batch.segments % 2 == 1) & (batch.targets >= 0)


def sft_scale(config: Config, batch: Batch) -> jax.Array:
    """Returns the factor of chosen_nll in the summed objective of a part of `batch` [A, B, T].

    Divided by the preferences of the batch, it is dpo_sft_weight / the targets of chosen in it.
    """
    preferences = jnp.sum(jnp.max(batch.segments, axis=-1) // 2)
    return config.training.dpo_sft_weight * preferences / jnp.maximum(jnp.sum(_is_chosen(batch)), 1)


def preference_means(config: Config, sums: PreferenceSums) -> tuple[Any, PreferenceMetrics]:
    """Returns the mean objective of a complete batch [nats], and its metrics.

    Args:
        config: of the run.
        sums: over all micro-batches; arrays on the device, or numbers.
    """
    per_preference = 1 / jnp.maximum(sums.preferences, 1)
    sft_loss = sums.chosen_nll / jnp.maximum(sums.chosen_targets, 1)
    loss = sums.loss * per_preference + config.training.dpo_sft_weight * sft_loss
    return loss, PreferenceMetrics(
        chosen_reward=sums.chosen_reward * per_preference,
        rejected_reward=sums.rejected_reward * per_preference,
        margin=(sums.chosen_reward - sums.rejected_reward) * per_preference,
        accuracy=sums.correct * per_preference,
        preferences=sums.preferences,
    )
