"""One step of training, as a pure function."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from llama_jax.config.run import Config
from llama_jax.data.windows import Batch
from llama_jax.model.lora import Trained
from llama_jax.model.weights import Llama
from llama_jax.training.dpo import (
    PreferenceMetrics,
    PreferenceSums,
    preference_means,
    preference_sums,
    sft_scale,
)
from llama_jax.training.loss import RowSums, loss_sums
from llama_jax.training.optimizer import adamw, clip_scale, learning_rate
from llama_jax.training.trainable import complete_model, dropout_keys, init_trained


class StepMetrics(NamedTuple):
    """Metrics of one step; scalars on the device."""

    loss: jax.Array  # mean cross-entropy of the targets [nats per token]; DPO [nats per preference]
    grad_norm: jax.Array  # global norm of the gradient before clipping
    learning_rate: jax.Array
    targets: jax.Array  # number of targets that the loss counts
    skipped: jax.Array  # True: the gradient was not finite, and the step changed no weights
    held: jax.Array  # True: a `Gate` was closed, and the step changed no weights
    preferences: PreferenceMetrics | None  # for DPO
    rows: RowSums | None  # of each row, [A, B]; not for DPO


class Gate(NamedTuple):
    """Holds a step on the devices: it then changes no weights, and no host has to wait for that.

    The host sees a held step one step later. Until then the devices hold the next one too, so the
    state is still the one before the held step.
    """

    limits: Any  # highest loss and gradient norm that may change weights, float32 [2]; NaN: any
    held: Any  # `StepMetrics.held` of the step that was dispatched before


class Gradients(NamedTuple):
    """The gradient of the mean objective of a batch, and metrics of the batch."""

    grads: Trained
    loss: jax.Array  # see StepMetrics
    targets: jax.Array
    preferences: PreferenceMetrics | None
    rows: RowSums | None


@partial(jax.jit, static_argnums=0)
def init_state(config: Config, key: jax.Array) -> tuple[Trained, optax.OptState]:
    """Returns what the run trains, initialized, and its optimizer state, on the current mesh.

    Args:
        config: of the run.
        key: `trainable.initial_key(config)`, or any key if only the shapes matter.
    """
    trained = init_trained(config, key)
    return trained, adamw(config.optimizer).init(trained)


def gradients(
    config: Config,
    trained: Trained,
    batch: Batch,
    base: Llama | None = None,
    step: jax.Array | None = None,
) -> Gradients:
    """Returns the gradient of the mean objective, and the metrics of the batch.

    `batch` has a leading axis A of micro-batches, which are computed one after another. Sums are
    accumulated, and divided once by the number of targets (for DPO: preferences) of all
    micro-batches. So the result is that of the undivided batch, however the targets are distributed
    over the micro-batches.

    Args:
        config: of the run.
        trained: all weights, or the pairs of a LoRA run. Only they have gradients.
        batch: of this step.
        base: the frozen weights of a LoRA run; for DPO also the reference.
        step: number of the step, which determines the dropout; None: no dropout.
    """
    keys = dropout_keys(config, step)
    scale = sft_scale(config, batch) if config.training.objective == "dpo" else None

    def micro_batch_sums(trained: Trained, batch: Batch, key: jax.Array | None):
        def objective(trained: Trained):
            return _sums(config, trained, batch, base, key, scale)

        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(trained)
        return grads, sums

    if config.training.micro_batches == 1:
        first = jax.tree.map(lambda x: x[0], (batch, keys))
        grads, sums = micro_batch_sums(trained, *first)
        sums = jax.tree.map(lambda x: x[None], sums)
    else:

        def add(total, inputs):
            grads, sums = micro_batch_sums(trained, *inputs)
            return jax.tree.map(jnp.add, total, grads), sums

        zeros = jax.tree.map(jnp.zeros_like, trained)
        grads, sums = jax.lax.scan(add, zeros, (batch, keys))
    if isinstance(sums, PreferenceSums):
        sums = jax.tree.map(jnp.sum, sums)
        per_preference = 1 / jnp.maximum(sums.preferences, 1)
        loss, preferences = preference_means(config, sums)
        grads = jax.tree.map(lambda g: g * per_preference, grads)
        return Gradients(grads, loss, sums.targets, preferences, None)
    # Each device gets the sums of all rows, in one collective for all micro-batches.
    rows = jax.tree.map(lambda x: jax.reshard(x, P()), sums)
    nll, targets = jax.tree.map(jnp.sum, rows)
    per_target = 1 / jnp.maximum(targets, 1)
    grads = jax.tree.map(lambda g: g * per_target, grads)
    return Gradients(grads, nll * per_target, targets, None, rows)


def _sums(
    config, trained, batch, base, key=None, scale=None
) -> tuple[jax.Array, RowSums | PreferenceSums]:
    """Returns the summed objective of a batch [B, T], and the sums for its metrics."""
    model = complete_model(config, trained, base, key)
    if config.training.objective == "dpo":
        return preference_sums(config, model, base, batch, scale)
    return loss_sums(config.model, model, batch, config.training.z_loss)


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_step(
    config: Config,
    trained: Trained,
    opt_state: optax.OptState,
    batch: Batch,
    step: jax.Array,
    base: Llama | None = None,
    gate: Gate | None = None,
) -> tuple[Trained, optax.OptState, StepMetrics]:
    """Returns the trained weights and optimizer state after step number `step` (0 is the first).

    >>> model, opt_state = lj.initial_state(run)
    >>> losses = []
    >>> for step in range(3):
    ...     model, opt_state, metrics = lj.train_step(run, model, opt_state, batch, step)
    ...     losses.append(float(metrics.loss))
    >>> losses[2] < losses[0]
    True

    A step whose gradient is not finite returns the old weights and state, and sets `skipped`; one
    that `gate` holds sets `held`. The buffers of the old weights and state are donated. With
    `config.lora` the trained weights are the pairs, and `base`, which is not donated, is the model
    beside which they are trained. For DPO `base` is the reference.
    """
    grads, loss, targets, preferences, rows = gradients(config, trained, batch, base, step)
    with jax.named_scope("optimizer"):
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm)
        held = _is_held(gate, loss, norm)
        changes = finite & ~held
        clip = clip_scale(config.optimizer, norm)
        rate = jnp.asarray(learning_rate(config.optimizer, config.training.steps)(step))
        updates, new_state = adamw(config.optimizer).update(
            jax.tree.map(lambda g: g * clip, grads), opt_state, trained
        )
        new_trained = jax.tree.map(lambda w, u: w - rate.astype(u.dtype) * u, trained, updates)
        select = partial(jax.tree.map, lambda new, old: jnp.where(changes, new, old))
        metrics = StepMetrics(loss, norm, rate, targets, ~finite, held, preferences, rows)
        return select(new_trained, trained), select(new_state, opt_state), metrics


def _is_held(gate: Gate | None, loss: jax.Array, norm: jax.Array) -> jax.Array:
    """Returns whether the gate holds a step, as it does if the loss or norm is not finite."""
    if gate is None:
        return jnp.zeros((), bool)
    limits = jnp.asarray(gate.limits)
    inside = (loss <= limits[0]) & (norm <= limits[1]) & jnp.isfinite(norm)
    return gate.held | (~inside & ~jnp.isnan(limits[0]))


@partial(jax.jit, static_argnums=0)
def eval_step(
    config: Config, trained: Trained, batch: Batch, base: Llama | None = None
) -> tuple[jax.Array, jax.Array] | PreferenceSums:
    """Returns the sums of a batch [A, B, T]: cross-entropy [nats] and number of targets."""
    sums = jax.lax.map(lambda rows: _sums(config, trained, rows, base)[1], batch)
    sums = jax.tree.map(jnp.sum, sums)
    return sums if isinstance(sums, PreferenceSums) else tuple(sums)
