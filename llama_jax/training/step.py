"""One step of training, as a pure function."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from llama_jax.config.run import Config
from llama_jax.data.windows import Batch
from llama_jax.model.weights import Llama
from llama_jax.training.loss import loss_sums
from llama_jax.training.optimizer import adamw, clip_scale, learning_rate


class StepMetrics(NamedTuple):
    """Metrics of one step; scalars on the device."""

    loss: jax.Array  # mean cross-entropy of the counted targets [nats per token]
    grad_norm: jax.Array  # global norm of the gradient before clipping
    learning_rate: jax.Array
    targets: jax.Array  # number of targets that the loss counts
    skipped: jax.Array  # True: the gradient was not finite, and the step changed no weights


def init_state(config: Config, key: jax.Array) -> tuple[Llama, optax.OptState]:
    """Returns initial weights and the optimizer's state for them, sharded on the current mesh."""
    model = Llama(config.model, key)
    return model, adamw(config.optimizer).init(model)


def gradients(config: Config, model: Llama, batch: Batch) -> tuple[Llama, jax.Array, jax.Array]:
    """Returns the gradient of the mean objective, the mean loss, and the counted targets.

    `batch` has a leading axis A of micro-batches, which are computed one after another. Sums are
    accumulated, and divided once by the number of targets of all micro-batches. So the result is
    that of the undivided batch, however the targets are distributed over the micro-batches.
    """

    def micro_batch_sums(model: Llama, batch: Batch):
        loss = partial(loss_sums, config.model, z_loss=config.training.z_loss)
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(model, batch=batch)
        return grads, *sums

    if config.training.micro_batches == 1:
        grads, nll, targets = micro_batch_sums(model, jax.tree.map(lambda x: x[0], batch))
    else:
        zeros = jax.tree.map(jnp.zeros_like, model)

        def add(sums, batch):
            return jax.tree.map(jnp.add, sums, micro_batch_sums(model, batch)), None

        start = (zeros, jnp.float32(0), jnp.int32(0))
        (grads, nll, targets), _ = jax.lax.scan(add, start, batch)
    per_target = 1 / jnp.maximum(targets, 1)
    return jax.tree.map(lambda g: g * per_target, grads), nll * per_target, targets


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_step(
    config: Config, model: Llama, opt_state: optax.OptState, batch: Batch, step: jax.Array
) -> tuple[Llama, optax.OptState, StepMetrics]:
    """Returns weights and optimizer state after step number `step` (0 is the first).

    >>> model, opt_state = lj.initial_state(run)
    >>> losses = []
    >>> for step in range(3):
    ...     model, opt_state, metrics = lj.train_step(run, model, opt_state, batch, step)
    ...     losses.append(float(metrics.loss))
    >>> losses[2] < losses[0]
    True

    A step whose gradient is not finite returns the old weights and state, and sets `skipped`. The
    buffers of the old weights and state are donated.
    """
    grads, loss, targets = gradients(config, model, batch)
    with jax.named_scope("optimizer"):
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm)
        clip = clip_scale(config.optimizer, norm)
        rate = jnp.asarray(learning_rate(config.optimizer, config.training.steps)(step))
        updates, new_state = adamw(config.optimizer).update(
            jax.tree.map(lambda g: g * clip, grads), opt_state, model
        )
        new_model = jax.tree.map(lambda w, u: w - rate.astype(u.dtype) * u, model, updates)
        select = partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        metrics = StepMetrics(loss, norm, rate, targets, ~finite)
        return select(new_model, model), select(new_state, opt_state), metrics


@partial(jax.jit, static_argnums=0)
def eval_step(config: Config, model: Llama, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the summed cross-entropy [nats] and the counted targets of a batch [A, B, T]."""

    def add(sums: tuple[jax.Array, jax.Array], batch: Batch):
        _, more = loss_sums(config.model, model, batch, z_loss=0.0)
        return jax.tree.map(jnp.add, sums, more), None

    return jax.lax.scan(add, (jnp.float32(0), jnp.int32(0)), batch)[0]
